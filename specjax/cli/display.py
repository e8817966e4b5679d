"""How the command line looks: text coloured by origin, a spinner while compiling, a summary; findings of checks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from rich.console import Console, RenderableType
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from specjax import stats
from specjax.cli import bench_display
from specjax.cli.bench import Speed
from specjax.cli.exactness import Finding
from specjax.cli.generate import Summary, predicted_speedup
from specjax.cli.load_pair import Pair
from specjax.decode.stream import Origin
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
        for part in bench_display.parts(found):
            self._out.print(part)

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
    rates, turns = _rates(summary), summary.in_turn
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
        "runs": 1 if turns is None else len(turns.turns),
        "speedups": None if turns is None else list(turns.turns),
        "busy": None if turns is None else turns.is_busy,
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

    def has(name: str) -> bool:
        value = rates[name]
        return value is not None and not math.isnan(value)

    lines = [("speculative", f"{show('tokens_per_second', '.0f')} tokens/s on {summary.device}")]
    if rates["plain_tokens_per_second"] is not None:
        same = {None: "", True: ", the same tokens", False: ", other tokens (near-ties in this dtype?)"}
        lines.append(
            ("plain decoding", f"{show('plain_tokens_per_second', '.0f')} tokens/s{same[summary.same_tokens]}")
        )
    gains = [_measured(summary, show) if has("speedup") else None, _prediction(summary, show, has)]
    if any(gains):
        lines.append(("speed-up", "; ".join(filter(None, gains))))
    accepted = int(summary.stats.accepted.sum())
    drafted = int(summary.stats.drafted.sum())
    if drafted:
        lines.append(("acceptance", f"{show('acceptance_rate', '.0%')} ({accepted} of {drafted} drafted tokens)"))
    if has("tokens_per_round"):  # the first token is part of no round
        lines.append(("tokens per round", f"{show('tokens_per_round', '.2f')} of at most {summary.draft_len + 1}"))
    counts = stats.draft_lengths(summary.stats)
    if summary.controller != "fixed" and counts.sum():
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


def _measured(summary: Summary, show) -> str:
    turns = summary.in_turn
    if turns is not None and turns.is_busy:
        return str(turns)
    if turns is None or len(turns.turns) == 1:
        return f"{show('speedup', '.2f')}x in one run"
    return f"{show('speedup', '.2f')}x by medians of runs in turn ({turns.range})"


def _prediction(summary: Summary, show, has) -> str | None:
    """What the speed-up should be; None where no round was run."""
    if summary.profiled_speedup is not None:
        if not has("profiled_speedup"):
            return None
        return f"{show('profiled_speedup', '.2f')}x by this machine's profile for its rounds, without the prompt"
    if summary.controller != "fixed":
        return "no prediction without a profile"
    if not has("predicted_speedup"):
        return None
    return f"{show('predicted_speedup', '.2f')}x predicted where a pass costs what it reads (an accelerator, few rows)"
