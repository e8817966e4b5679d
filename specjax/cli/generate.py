"""What `specjax generate` does: load, compile, stream, measure. No printing: that is display.py's."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from specjax import stats, text, verify
from specjax.cli.batches import MOST_RUNS, Batch, Task, run_in_turn
from specjax.cli.choose_controller import choose
from specjax.cli.comparison import together
from specjax.cli.load_pair import Pair, load_pair, load_target
from specjax.types import Sampling, Stats, Status
from specjax.viewer.trace import Setting, Trace, TracedRow


class Row(NamedTuple):
    """What became of one prompt."""

    prompt: str
    text: str
    tokens: list[int]
    origins: list[int]
    status: Status


class Summary(NamedTuple):
    """Everything that the report says."""

    rows: list[Row]
    stats: Stats  # all rows, NumPy
    draft_len: int  # 0: there is no draft model, and all of it is plain decoding
    controller: str
    seconds: float  # with speculation where there is a draft model, compilation not counted
    baseline_seconds: float | None  # plain decoding of the same prompts
    in_turn: stats.SpeedUp | None  # by each of the runs that these are medians of; None without plain decoding
    baseline_tokens: int
    same_tokens: bool | None  # greedy only: whether both gave the same tokens
    draft_cost: float  # bytes of the draft's parameters over those of the target's
    profiled_speedup: float | None  # what the profile predicts, for controllers that have one
    round_costs: tuple[float, ...] | None  # of drafts of 0, 1, ..., K tokens, in plain steps, likewise
    device: str
    interrupted: bool

    @property
    def failed(self) -> bool:
        """Whether every row ended, or never began, for a reason that nobody asked for. The end of the model's positions
        is none: it was announced."""
        return all(row.status.is_trouble and row.status != Status.CACHE_FULL for row in self.rows)


class Display(Protocol):
    """Where progress and text go."""

    def busy(self, what: str) -> AbstractContextManager[Any]: ...

    def prompt(self, row: int, text: str, numbered: bool) -> None: ...

    def piece(self, piece: text.Piece) -> None: ...

    def end_row(self) -> None: ...

    def note(self, text: str) -> None: ...


def run(task: Task, texts: list[str], display: Display, keep: Callable[[Trace], None] | None = None) -> Summary:
    """Runs the task; Ctrl-C while tokens stream ends it early with what there is, and at once while it measures.

    `keep` is given the trace so far after each batch, as what comes next may end the process, and the whole at the end.
    """
    with display.busy("loading the models"):
        pair = _load(task)
    if pair.draft is None:
        task = task._replace(draft_len=0, baseline=False)  # there is nothing to compare plain decoding with
    rows: list[Row] = []
    parts: list[Stats] = []
    seconds, baseline_seconds = 0.0, 0.0
    turns = [(0.0, 0.0)] * MOST_RUNS
    plain: list[list[int]] = []
    traced: list[TracedRow] = []
    interrupted = False
    # Every batch has the width and capacity of the longest prompt, and the last one is filled up: one program for all.
    positions = pair.target.model.max_positions
    prompts = text.encode(pair.tokenizer, texts, limit=positions)
    trained, longest = pair.target.config.get("max_position_embeddings"), int(prompts.lengths.max())
    needed = longest + task.max_new_tokens
    if trained is not None and needed > trained:
        display.note(
            f"note: prompt and new tokens may reach {needed} tokens, the target was made for {trained}: past that its "
            "text is worth little."
        )
    if positions is not None and needed > positions:
        display.note(
            f"note: the target has {positions} positions, prompt and new tokens may need {needed}: a text that gets "
            "there ends."
        )
    size = min(task.batch, len(texts))
    chosen = choose(
        task.controller, pair, task.draft_len, batch=size,
        context=int(prompts.lengths.mean()) + task.max_new_tokens // 2, sampling=task.sampling,
        verifier=getattr(verify, task.verifier)(), kept_in=task.kept_in, busy=display.busy,
    )  # fmt: skip
    finished: list[Stats] = []  # with the rows that only fill a batch up
    learnt: Any = None  # goes on from batch to batch
    for start in range(0, len(texts), size):
        batch = Batch(task, pair, chosen.controller, prompts, start, size)
        batch.learnt = learnt
        with display.busy(f"compiling the {'speculative' if pair.draft else 'plain'} loop (once per shape)"):
            batch.warm_up()
        began = time.perf_counter()
        part, interrupted = _stream(batch, texts[start : start + size], rows, display, len(texts) > 1)
        shown = time.perf_counter() - began
        parts.append(part)
        learnt = batch.chunks[-1].controller_state if batch.chunks else learnt
        finished += [chunk.stats for chunk in batch.chunks[-1:]]
        if keep is not None:
            traced += batch.traced()
            keep(Trace(traced, _settings(task, pair, sum(len(row.tokens) for row in rows), seconds + shown)))
        if interrupted or not task.baseline:
            seconds += shown
            if interrupted:
                break
            continue
        with display.busy("measuring plain decoding, and speculation again"):
            timed = run_in_turn(batch, shown)
        seconds, baseline_seconds = seconds + timed.speculative, baseline_seconds + timed.plain
        turns = [(a + c, b + d) for (a, b), (c, d) in zip(turns, timed.turns, strict=False)]  # as many as all have
        plain += timed.tokens[: len(texts[start : start + size])]
    total = _up_to(_join(parts, chosen.controller.longest), task.draft_len)
    measured = task.baseline and not interrupted
    num_tokens, num_plain = sum(len(row.tokens) for row in rows), sum(map(len, plain))
    in_turn = None
    if measured and num_plain > 0:  # rows without finite logits emit nothing
        in_turn = stats.speedup_in_turn(*zip(*turns, strict=True), tokens=num_tokens / num_plain)
    context = float(prompts.lengths.mean()) + task.max_new_tokens / 2
    profile = chosen.profile
    profiled = None if profile is None else stats.profiled_speedup(*finished, profile=profile, context=context)
    summary = Summary(
        rows=rows,
        stats=total,
        draft_len=task.draft_len,
        controller=_controller(task, pair),
        seconds=seconds,
        baseline_seconds=baseline_seconds if measured else None,
        baseline_tokens=num_plain,
        in_turn=in_turn,
        same_tokens=[row.tokens for row in rows] == plain if measured and task.sampling.temperature == 0 else None,
        draft_cost=_num_bytes(pair.draft.params) / _num_bytes(pair.target.params) if pair.draft else 0.0,
        profiled_speedup=profiled,
        round_costs=None if profile is None else profile.at(size, context).in_steps(),
        device=jax.devices()[0].device_kind,
        interrupted=interrupted,
    )
    if keep is not None and in_turn is not None:
        gain = str(in_turn) if in_turn.is_busy else num_tokens / seconds * baseline_seconds / num_plain
        plainly = {"plain decoding": _pace(num_plain, baseline_seconds), "speed-up": gain}
        keep(Trace(traced, {**_settings(task, pair, num_tokens, seconds), **plainly}))
    return summary


def _load(task: Task) -> Pair:
    if task.model is not None and task.draft is None:
        return load_target(task.model, task.tokenizer, task.dtype)
    return load_pair(task.model, task.draft, task.tokenizer, task.dtype)


def _controller(task: Task, pair: Pair) -> str:
    return task.controller.value if pair.draft else "none"


def _settings(task: Task, pair: Pair, num_tokens: int, seconds: float) -> dict[str, Setting]:
    """What the text was made with, and how fast."""
    plain = Sampling()._asdict()
    sampling = {
        name.replace("_", "-"): value for name, value in task.sampling._asdict().items() if value != plain[name]
    }
    return {
        "target": task.model or "shipped",
        "draft": (task.draft or "shipped") if pair.draft else "none",
        "dtype": ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(pair.target.params)})),
        "K": task.draft_len,
        "controller": _controller(task, pair),
        "verifier": task.verifier,
        **{"temperature": 0, **sampling},
        "seed": task.seed,
        "device": jax.devices()[0].device_kind,
        "speculative" if pair.draft else "plain decoding": _pace(num_tokens, seconds),
    }


def _pace(num_tokens: int, seconds: float) -> str:
    return f"{num_tokens / seconds:.0f} tokens/s in {seconds:.3g} s"


def _stream(batch: Batch, texts: list[str], rows: list[Row], display: Display, numbered: bool) -> tuple[Stats, bool]:
    """Streams one batch to the display and appends its rows; the counts, and whether Ctrl-C ended it."""
    printer = batch.printer()
    several = len(texts) > 1 or len(batch.prompts.lengths) > 1
    pieces: list[list[text.Piece]] = [[] for _ in texts]
    status = [Status.ACTIVE] * len(texts)
    latest = stats.zeros(len(texts), batch.controller.longest)
    interrupted = False

    def show(new: list[text.Piece]) -> None:
        for piece in new:
            if piece.row >= len(texts):
                continue
            pieces[piece.row].append(piece)
            if not several:
                display.piece(piece)

    if not several:
        display.prompt(len(rows), texts[0], numbered)
    try:
        for chunk, new in printer.follow(batch.stream(batch.task.max_new_tokens)):
            batch.chunks.append(chunk)
            latest = chunk.stats
            status = [Status(value) for value in printer.status(chunk)[: len(texts)]]
            show(new)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        show(printer.rest())
        first = len(rows)
        for row, prompt in enumerate(texts):
            if several:  # rows come interleaved: shown one after the other
                display.prompt(first + row, prompt, numbered)
                for piece in pieces[row]:
                    display.piece(piece)
            display.end_row()
            whole = "".join(piece.text for piece in pieces[row])
            tokens = [piece.token for piece in pieces[row]]
            rows.append(Row(prompt, whole, tokens, [int(piece.origin) for piece in pieces[row]], status[row]))
            if printer.stopped[row]:
                batch.end_at(row, len(tokens))
    return Stats(*(np.asarray(counts)[: len(texts)] for counts in latest)), interrupted  # type: ignore[arg-type]


def _join(parts: list[Stats], draft_len: int) -> Stats:
    return together(parts or [stats.zeros(0, draft_len)])


def _up_to(counts: Stats, draft_len: int) -> Stats:
    """The counts without places past `draft_len`, of which there are any only where nothing is drafted."""
    places = {name: getattr(counts, name)[:, :draft_len] for name in ("drafted", "tested", "accepted")}
    return counts._replace(**places, by_longest=counts.by_longest[:, : draft_len + 1])


def _num_bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def predicted_speedup(summary: Summary) -> float:
    """The speed-up if time were bytes read and verification cost one step: what the pair allows at best."""
    alpha = stats.token_acceptance(summary.stats)
    return stats.predicted_speedup(alpha, summary.draft_len, summary.draft_cost)
