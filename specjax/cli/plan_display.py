"""A plan as tables for a terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from specjax.aot.costs import PARTS
from specjax.aot.planning import Report
from specjax.aot.programs import Compiled
from specjax.aot.topology import GIB

_SHARES = {"full": "cache full", "eighth": "cache an eighth full"}


def headline(report: Report) -> str:
    """One sentence: does it fit?"""
    if report.fits:
        return f"fits: {_gib(report.needed)} of {_gib(report.hbm)} GiB a chip"
    worst = max(report.programs, key=_needed)
    return (
        f"does not fit: {worst.name} needs {_gib(report.needed)} GiB of {_gib(report.hbm)} a chip. More chips, a "
        "smaller batch or capacity, or a longer model axis would help."
    )


def tables(report: Report) -> Iterator[Table | Text]:
    """What to print, in order."""
    mesh = ", ".join(f"{name}={size}" for name, size in report.mesh.items())
    yield Text(
        f"{report.target} with draft {report.draft} on {report.topology} ({mesh}): batch {report.batch}, capacity "
        f"{report.capacity}, K = {report.draft_len}, {report.dtype}"
    )
    yield Text(headline(report), style="bold green" if report.fits else "bold red")
    yield _memory(report)
    if report.costs:
        yield _costs(report)
        yield Text(
            "The estimate leaves out weights that are fetched ahead of their use. So a model's passes count as what "
            "their bytes take at the rate of main memory, where that is more. Sampling counts as if a row asked for "
            "top-k and top-p."
        )
        if report.kernels:
            yield Text(
                f"Of specjax's own kernels, {report.kernels} calls a round, the compiler has no estimate: counted is "
                "what they move, at the same rate."
            )
        least = min(cost.steps_per_round for cost in report.costs.values())
        yield Text(
            f"By these estimates speculation pays where a round brings more than {least:.1f} tokens a row; "
            f"{report.draft_len + 1} are the most."
        )
    if report.collectives:
        yield _collectives(report)


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as plain data: bytes, seconds and cycles."""
    return {
        **{name: value for name, value in report._asdict().items() if name not in ("programs", "costs", "collectives")},
        "programs": {
            item.name: {
                "seconds": item.seconds,
                "needed": _needed(item),
                "memory": None if item.memory is None else item.memory._asdict(),
            }
            for item in report.programs
        },
        "costs": {
            share: {
                "round_cycles": cost.round.by_part,
                "step_cycles": cost.step.by_part,
                "round_cycles_in_detail": cost.round._asdict(),
                "step_cycles_in_detail": cost.step._asdict(),
                "steps_per_round": cost.steps_per_round,
                "verification": cost.verification,
            }
            for share, cost in report.costs.items()
        },
        "collectives_per_round": [item._asdict() for item in report.collectives],
        "compile_seconds": report.seconds,
    }


def _memory(report: Report) -> Table:
    table = Table("program", title="GiB a chip", title_justify="left")
    for name in ("arguments", "of them aliased", "temporaries", "peak", "compiled in"):
        table.add_column(name, justify="right")
    for item in report.programs:
        if item.memory is None:
            table.add_row(item.name, "", "", "", Text(_gib(_needed(item)), "bold red"), f"{item.seconds:.0f} s")
        else:
            memory = item.memory
            sizes = (memory.arguments, memory.aliased, memory.temporaries, memory.peak)
            table.add_row(item.name, *map(_gib, sizes), f"{item.seconds:.0f} s")
    return table


def _costs(report: Report) -> Table:
    shares = report.costs.items()
    table = Table(
        "million cycles of a chip", title="the compiler's estimate, without collectives", title_justify="left"
    )
    for share, _ in shares:
        table.add_column(f"round, {_SHARES[share]}", justify="right")
        table.add_column("step", justify="right")
    turns = [turn for _, cost in shares for turn in (cost.round, cost.step)]
    for part in PARTS.values():
        table.add_row(part, *(_millions(turn.estimated[part] + turn.counted[part]) for turn in turns))
        if any(turn.least[part] for turn in turns):
            table.add_row("  its bytes alone", *(_millions(turn.least[part]) for turn in turns))
    table.add_section()
    table.add_row("all, the larger of both", *(_millions(turn.all) for turn in turns))
    table.add_row("of it own kernels", *(_millions(sum(turn.counted.values())) for turn in turns))
    table.add_row("steps a round costs", *(text for _, cost in shares for text in (f"{cost.steps_per_round:.2f}", "")))
    table.add_row(
        f"pass over {report.draft_len + 1} tokens",
        *(text for _, cost in shares for text in (f"{cost.verification:.2f} of one", "")),
    )
    return table


def _collectives(report: Report) -> Table:
    table = Table("for", "kind", title="collectives in a round", title_justify="left")
    for name in ("times", "per layer and pass", "KiB"):
        table.add_column(name, justify="right")
    for item in report.collectives:
        per_layer = "" if item.per_layer is None else f"{item.per_layer:.2f}"
        table.add_row(item.part, item.kind, str(item.times), per_layer, f"{item.bytes / 1024:.0f}")
    return table


def _needed(item: Compiled) -> int:
    return item.memory.peak if item.memory else item.needed or 0


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _millions(cycles: int) -> str:
    return f"{cycles / 1e6:.2f}"
