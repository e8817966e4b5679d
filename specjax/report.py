"""How the command line looks: text coloured by origin, a spinner while compiling, a summary; findings of checks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from rich.console import Console, RenderableType
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from specjax import stats
from specjax.contest import Way
from specjax.exactness import Finding
from specjax.pair import Pair
from specjax.policy import Policy
from specjax.runner import Summary, predicted_speedup
from specjax.speed import Line, Speed
from specjax.stream import Origin
from specjax.text import Piece

STYLES = {
    Origin.PROMPT_END: "cyan",
    Origin.ACCEPTED: "green",
    Origin.CORRECTED: "red",
    Origin.BONUS: "cyan",
}

_HANDLER = "specjax command line"
_INTERRUPTED = "what was generated until then is shown"


class Display:
    """Text to standard output; everything else to standard error."""

    def __init__(self, *, plain: bool, silent: bool, verbose: int = 0):
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False)
        self._plain, self._silent = plain, silent
        self.is_busy = False  # read by another thread
        if verbose:
            _log_to(self._err, logging.INFO if verbose == 1 else logging.DEBUG)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner, where standard error is a terminal."""
        shows = self._err.is_terminal
        self.is_busy = True
        try:
            with self._err.status(f"{what} ...") if shows else nullcontext():
                yield
        finally:
            self.is_busy = False

    def note(self, text: str) -> None:
        """Something to know, to standard error."""
        self._err.print(text, style="yellow")

    def prompt(self, row: int, text: str, numbered: bool) -> None:
        """The prompt, before its continuation; numbered where there are several."""
        if self._silent:
            return
        if numbered:
            self._write(f"[{row}] ", "bold")
        self._write(text, "dim")

    def piece(self, piece: Piece) -> None:
        """The text of one token."""
        if not self._silent:
            self._write(piece.text, STYLES[piece.origin])

    def end_row(self) -> None:
        """The end of one continuation."""
        if not self._silent:
            self._write("\n", "")

    def summary(self, summary: Summary) -> None:
        """What speculation brought, to standard error."""
        if not self._plain and summary.draft_len > 0:
            legend = Text("accepted draft", STYLES[Origin.ACCEPTED]) + Text("  corrected", STYLES[Origin.CORRECTED])
            self._err.print(legend + Text("  from the target (first, bonus)", STYLES[Origin.BONUS]))
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in _lines(summary):
            table.add_row(name, value)
        self._err.print(table)
        for index, row in enumerate(summary.rows):
            if row.status.is_trouble:
                self._err.print(f"prompt {index}: {row.status.describe()}", style="yellow")

    def finding(self, finding: Finding) -> None:
        """One check of the exactness suite, to standard output."""
        for line in finding_lines(finding):
            self._out.print(line)

    def verdict(self, findings: list[Finding], pair: Pair) -> None:
        """All checks together."""
        failed = sum(not finding.passed for finding in findings)
        where = f"on {jax.devices()[0].device_kind}, parameters in {_dtype(pair)}, jax {jax.__version__}"
        if failed:
            self._out.print(Text(f"{failed} of {len(findings)} checks failed {where}", "bold red"))
        else:
            self._out.print(Text(f"all {len(findings)} checks passed {where}", "bold green"))

    def speed(self, found: Speed) -> None:
        """What was measured, to standard output."""
        setting, machine = found.setting, found.machine
        names = [_way(line) for line in found.lines]
        rows = f"{setting.prompts} prompts, {setting.batch} at once"
        title = f"{machine.name}, {found.dtype}, {rows}, temperature {setting.temperature:g}"
        table = Table("", *names, title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, cells in zip(_SPEED_ROWS, zip(*map(_speed_cells, found.lines), strict=True), strict=True):
            table.add_row(name, *cells)
        self._out.print(table)
        lengths = f"{setting.max_new_tokens // 4} and {setting.max_new_tokens}"
        for line in (
            f"Time: the difference between generating {lengths} tokens over the difference in steps or rounds, so "
            f"prefill and the call drop out; medians of {setting.repeats}, the speed-up of paired runs.",
            "Tokens a round: of that difference. Acceptance, places used, rounds by length: of the longer generations.",
            "Whole calls: prefill and the wait for the slowest row included.",
            f"Limit: weights, logits and {found.live:.0f} live tokens a row, once per forward pass, at "
            f"{machine.bandwidth / 1e9:.4g} GB/s and {machine.flops / 1e12:.3g} TFLOP/s ({machine.origin}).",
        ):
            self._out.print(line, style="dim")

    def show(self, parts: Iterable[RenderableType]) -> None:
        """Tables and the like, to standard output."""
        for part in parts:
            self._out.print(part, soft_wrap=False)

    def _write(self, text: str, style: str) -> None:
        if self._plain:
            self._out.file.write(text)
            self._out.file.flush()
        else:
            self._out.print(Text(text, style=style), end="")


def finding_lines(finding: Finding) -> Iterator[Text]:
    """One check, as lines."""
    mark = ("passed", "green") if finding.passed else ("FAILED", "bold red")
    yield Text.assemble(mark, f"  {finding.check} ({finding.seconds:.0f} s)")
    for line in finding.detail.splitlines():
        yield Text(f"        {line}", "dim")


def _log_to(console: Console, level: int) -> None:
    """Shows what the library logs, on the console that also spins."""
    log = logging.getLogger("specjax")
    for handler in [handler for handler in log.handlers if handler.get_name() == _HANDLER]:
        log.removeHandler(handler)
    shown = RichHandler(
        console=console, highlighter=NullHighlighter(), show_path=False, omit_repeated_times=False,
        log_time_format="%H:%M:%S",
    )  # fmt: skip
    shown.set_name(_HANDLER)
    log.addHandler(shown)
    log.setLevel(level)


def findings_as_json(findings: list[Finding], pair: Pair) -> dict[str, Any]:
    """The exactness suite as plain data."""
    return {
        "passed": all(finding.passed for finding in findings),
        "checks": [finding._asdict() for finding in findings],
        "device": jax.devices()[0].device_kind,
        "dtype": _dtype(pair),
        "jax": jax.__version__,
    }


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
        f"{line.speedup:.2f}",
        "" if line.predicted_speedup is None else f"{line.predicted_speedup:.2f}",
        "" if split is None else f"{1e3 * split['drafting']:.2f}, {1e3 * split['verification']:.2f} ms",
        f"{line.call_tokens_per_second:.0f}",
        f"{line.call_speedup:.2f}",
        f"{line.work.bytes / 1e6:.4g} MB",
        f"{line.work.flops / 1e9:.3g} GFLOP",
        f"{1e3 * line.limit_seconds:.2f} ms",
        f"{line.seconds / line.limit_seconds:.2f}",
    ]


def _way(line: Line) -> str:
    return str(Way(Policy(line.controller) if line.controller else None, line.draft_len or 0))


def speed_as_json(found: Sequence[Speed]) -> dict[str, Any]:
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


def _dtype(pair: Pair) -> str:
    return ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(pair.target.params)}))


def as_json(summary: Summary) -> dict[str, Any]:
    """The whole run as plain data; null for what was not measured."""
    rows = [
        {
            "prompt": row.prompt,
            "text": row.text,
            "tokens": row.tokens,
            "origins": [Origin(origin).name.lower() for origin in row.origins],
            "status": row.status.name.lower(),
        }
        for row in summary.rows
    ]
    rates = _rates(summary)
    numbers = {name: None if value is None or math.isnan(value) else value for name, value in rates.items()}
    return {
        "results": rows,
        "draft_len": summary.draft_len,
        "controller": summary.controller,
        **numbers,
        "draft_lengths": stats.draft_lengths(summary.stats).tolist(),
        "round_costs": None if summary.round_costs is None else list(summary.round_costs),
        "acceptance_by_position": [
            None if math.isnan(share) else share for share in stats.acceptance_by_position(summary.stats).tolist()
        ],
        "same_tokens_as_plain": summary.same_tokens,
        "runs": summary.runs,
        "device": summary.device,
        "interrupted": summary.interrupted,
    }


def _rates(summary: Summary) -> dict[str, float | None]:
    emitted = sum(len(row.tokens) for row in summary.rows)
    speculative = emitted / summary.seconds if summary.seconds > 0 else None
    plain = summary.baseline_tokens / summary.baseline_seconds if summary.baseline_seconds else None
    return {
        "tokens_per_second": speculative,
        "plain_tokens_per_second": plain,
        "speedup": speculative / plain if speculative and plain else None,
        # Of one draft length; where it varies, only a profile can say.
        "predicted_speedup": predicted_speedup(summary) if summary.controller == "fixed" else None,
        "profiled_speedup": summary.profiled_speedup,
        "draft_utilisation": stats.draft_utilisation(summary.stats),
        "acceptance_rate": stats.acceptance_rate(summary.stats),
        "tokens_per_round": stats.tokens_per_round(summary.stats),
    }


def _lines(summary: Summary) -> list[tuple[str, str]]:
    rates = _rates(summary)

    def show(name: str, form: str) -> str:
        value = rates[name]
        return "-" if value is None or math.isnan(value) else format(value, form)

    if summary.draft_len == 0:
        pace = f"{show('tokens_per_second', '.0f')} tokens/s on {summary.device}"
        lines = [("plain decoding", pace), ("no draft model", "one token a pass; --draft names a model to draft with")]
        return lines + [("interrupted", _INTERRUPTED)] * summary.interrupted
    lines = [("speculative", f"{show('tokens_per_second', '.0f')} tokens/s on {summary.device}")]
    if rates["plain_tokens_per_second"] is not None:
        same = {None: "", True: ", the same tokens", False: ", other tokens (near-ties in this dtype?)"}
        lines.append(
            ("plain decoding", f"{show('plain_tokens_per_second', '.0f')} tokens/s{same[summary.same_tokens]}")
        )
        runs = "in one run" if summary.runs == 1 else f"by medians of {summary.runs} runs in turn"
        lines.append(("speed-up", f"{show('speedup', '.2f')}x {runs}, {_prediction(summary, show)}"))
    else:
        lines.append(("speed-up", _prediction(summary, show)))
    accepted = int(summary.stats.accepted.sum())
    drafted = int(summary.stats.drafted.sum())
    if drafted:
        lines.append(("acceptance", f"{show('acceptance_rate', '.0%')} ({accepted} of {drafted} drafted tokens)"))
    lines.append(("tokens per round", f"{show('tokens_per_round', '.2f')} of at most {summary.draft_len + 1}"))
    if summary.controller != "fixed":
        counts = stats.draft_lengths(summary.stats)
        shares = ", ".join(f"{size} in {count / counts.sum():.0%}" for size, count in enumerate(counts) if count)
        lines.append(("tokens drafted", f"{shares} of the rounds ({summary.controller})"))
    if summary.round_costs is not None:
        lines.append(("a round costs", _costs(summary.round_costs)))
    if summary.interrupted:
        lines.append(("interrupted", _INTERRUPTED))
    return lines


def _costs(rounds: tuple[float, ...]) -> str:
    """Rounds in plain steps, and whether any draft could pay.

    >>> _costs((1.0, 2.4))
    '1.00, 2.40 plain steps with 0, 1, ... tokens drafted; no draft pays here, even if all of it is right'
    """
    can_pay = any((size + 1) / cost > 1 / rounds[0] for size, cost in enumerate(rounds))
    verdict = "it pays where it emits more" if can_pay else "no draft pays here, even if all of it is right"
    costs = ", ".join(f"{cost:.2f}" for cost in rounds)
    return f"{costs} plain steps with 0, 1, ... tokens drafted; {verdict}"


def _prediction(summary: Summary, show) -> str:
    if summary.profiled_speedup is not None:
        return f"{show('profiled_speedup', '.2f')}x by this machine's profile for its rounds, without the prompt"
    if summary.controller != "fixed":
        return "no prediction without a profile"
    return f"{show('predicted_speedup', '.2f')}x predicted where a pass costs what it reads (an accelerator, few rows)"
