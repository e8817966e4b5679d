"""What `specjax bench` says of speed, for a terminal and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from specjax.cli.bench import Line, Speed
from specjax.cli.choose_controller import Policy
from specjax.cli.comparison import Way
from specjax.stats import BUSY, SpeedUp


def parts(found: Speed) -> Iterator[RenderableType]:
    """A table of what was measured, which of it is worth nothing on this machine, and what the numbers mean."""
    setting, machine = found.setting, found.machine
    names = [_way(line) for line in found.lines]
    rows = f"{setting.prompts} prompts, {setting.batch} at once"
    title = f"{machine.name}, {found.dtype}, {rows}, temperature {setting.temperature:g}"
    table = Table("", *names, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in zip(_SPEED_ROWS, zip(*map(_speed_cells, found.lines), strict=True), strict=True):
        table.add_row(name, *cells)
    yield table
    busy = [line for line in found.lines if line.busy]
    for line in busy:
        yield Text(f"{_way(line)}: {BUSY}. Speed-ups from {SpeedUp(tuple(line.speedups)).range}.", "bold yellow")
    if busy:
        yield Text("More --repeats help a little, and an idle machine does.", "yellow")
    lengths = f"{setting.max_new_tokens // 4} and {setting.max_new_tokens}"
    for line in (
        f"Time: the difference between generating {lengths} tokens over the difference in steps or rounds, so "
        f"prefill and the call drop out; medians of {setting.repeats}, the speed-up of paired runs.",
        "Tokens a round: of that difference. Acceptance, places used, rounds by length: of the longer generations.",
        "Whole calls: prefill and the wait for the slowest row included.",
        f"Limit: weights, logits and {found.live:.0f} live tokens a row, once per forward pass, at "
        f"{machine.bandwidth / 1e9:.4g} GB/s and {machine.flops / 1e12:.3g} TFLOP/s ({machine.origin}).",
    ):
        yield Text(line, "dim")


_SPEED_ROWS = (
    "time of a step, a round", "tokens a round", "acceptance", "by position", "places used", "rounds by length",
    "tokens/s", "speed-up", "predicted", "drafting, verifying", "tokens/s, whole calls", "speed-up, whole calls",
    "moved a step, a round", "computed", "limit", "measured / limit",
)  # fmt: skip


def _speed_cells(line: Line) -> list[str]:
    speculates = line.controller is not None
    total, split = sum(line.draft_lengths), line.time_split
    shares = [f"{place}: {count / total:.0%}" for place, count in enumerate(line.draft_lengths) if count]
    return [
        f"{1e3 * line.seconds:.2f} ms",
        f"{line.tokens_per_pass:.2f}" if speculates else "",
        _percent(line.acceptance),
        " ".join(_percent(share) or "-" for share in line.acceptance_by_position),
        _percent(line.draft_utilisation),
        "\n".join(shares),
        f"{line.tokens_per_second:.0f}",
        "busy" if line.busy else f"{line.speedup:.2f}",
        "" if line.predicted_speedup is None else f"{line.predicted_speedup:.2f}",
        "" if split is None else f"{1e3 * split['drafting']:.2f}, {1e3 * split['verification']:.2f} ms",
        f"{line.call_tokens_per_second:.0f}",
        "busy" if line.busy else f"{line.call_speedup:.2f}",
        f"{line.work.bytes / 1e6:.4g} MB",
        f"{line.work.flops / 1e9:.3g} GFLOP",
        f"{1e3 * line.limit_seconds:.2f} ms",
        f"{line.seconds / line.limit_seconds:.2f}",
    ]


def _way(line: Line) -> str:
    return str(Way(Policy(line.controller) if line.controller else None, line.draft_len or 0))


def as_json(found: Sequence[Speed]) -> dict[str, Any]:
    """Speed measurements as plain data, in seconds, bytes and floating-point operations; one for each batch size."""
    lines = []
    for line in (line for speed in found for line in speed.lines):
        work = {"bytes": line.work.bytes, "flops": line.work.flops}
        lines.append({**line._asdict(), "work": work, "measured_over_limit": line.seconds / line.limit_seconds})
    return {
        "lines": lines,
        "setting": found[0].setting._asdict(),
        "batches": [speed.setting.batch for speed in found],
        "machine": found[0].machine._asdict(),
        "live_tokens": found[0].live,
        "dtype": found[0].dtype,
        "jax": jax.__version__,
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
