"""One batch of prompts for `specjax generate`: streamed, and timed in turn with plain decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from specjax import drafters, text, verify
from specjax.cli.choose_controller import Policy
from specjax.cli.load_pair import Pair
from specjax.decode import plain
from specjax.decode.api import autoregressive, generate
from specjax.decode.stream import Chunk, stream
from specjax.detokenize.pieces import codec
from specjax.noise import IMPLEMENTATION
from specjax.profiling.paired_timing import in_turn
from specjax.types import Controller, Generation, Sampling
from specjax.viewer import trace
from specjax.viewer.trace import TracedRow

_CAPACITY_STEP = 128
_ROUNDS_PER_DISPATCH = 4  # a dispatch takes a millisecond of the host, and a round of a small model no more
MOST_RUNS, _PATIENCE = 5, 2.0  # runs of each kind that count, and seconds of them after which there are no more
_LONG = 10.0  # seconds of a run that nobody waits for twice


class Task(NamedTuple):
    """The arguments of one run."""

    model: str | None
    draft: str | None
    tokenizer: str | None
    dtype: str | None
    draft_len: int
    controller: Policy
    max_new_tokens: int
    sampling: Sampling
    verifier: str  # its maker's name in `specjax.verify`
    seed: int
    batch: int
    baseline: bool
    kept_in: Path | None = None  # a folder for profiles; None measures anew
    stop: tuple[str, ...] = ()  # strings that end a text
    special: bool = False  # whether special tokens are part of the text


class Batch:
    """One batch of prompts, ready to be generated in several ways."""

    def __init__(self, task: Task, pair: Pair, controller: Controller, prompts: text.Prompts, start: int, size: int):
        self.task, self.pair, self.controller = task, pair, controller
        self.learnt: Any = None  # the controller's state to start from
        chosen = np.arange(start, start + size) % len(prompts.lengths)
        self.prompts = text.Prompts(prompts.tokens[chosen], prompts.lengths[chosen])
        self.count = min(size, len(prompts.lengths) - start)
        self.options = {
            "sampling": task.sampling,
            "key": jax.random.key(task.seed, impl=IMPLEMENTATION),  # whatever JAX_DEFAULT_PRNG_IMPL says
            "seeds": np.arange(start, start + size, dtype=np.int32),
            "stop_tokens": pair.stop_tokens(),
            "capacity": _capacity(prompts.tokens.shape[1] + task.max_new_tokens, pair.target.model.max_positions),
        }
        self.chunks: list[Chunk] = []  # of the run that is shown
        self._most = np.full(len(self.prompts.lengths), np.iinfo(np.int32).max, np.int32)

    def printer(self) -> text.Printer:
        """For the run that is shown."""
        task = self.task
        return text.Printer(
            self.pair.tokenizer, self.prompts.ids(), stop=task.stop, skip_special_tokens=not task.special
        )

    def end_at(self, row: int, num_tokens: int) -> None:
        """Ends the row there in every run from now on: only the one that is shown looks for stop strings."""
        self._most[row] = num_tokens

    def stream(self, limit: int) -> Iterator[Chunk]:
        return stream(*self._roles(), **self._adaptively(limit), rounds_per_dispatch=_ROUNDS_PER_DISPATCH)

    def speculate(self, limit: int) -> Generation:
        return generate(*self._roles(), **self._adaptively(limit))

    def plain(self, limit: int) -> Generation:
        target = self.pair.target
        limits = self._limits(limit)
        return autoregressive(target.model, target.params, *self.prompts, max_new_tokens=limits, **self.options)

    def warm_up(self) -> None:
        """Compiles everything that streaming runs."""
        for _ in self.stream(self._enough()):
            pass

    def warm_up_calls(self) -> None:
        """Likewise, what is timed."""
        self.plain(2)
        self.speculate(self._enough())

    def traced(self) -> list[TracedRow]:
        """The rounds of each row."""
        tokenizer, prompts = self.pair.tokenizer, self.prompts.ids()[: self.count]
        decode = codec(tokenizer, skip_special_tokens=not self.task.special).decode
        return trace.collect(self.chunks, prompts, decode, name=tokenizer.id_to_token, stop=self.task.stop).rows

    def _roles(self) -> tuple[Any, ...]:
        target, draft = self.pair.target, self.pair.draft
        if draft is None:
            return target.model, target.params, plain.DRAFTER, (), *self.prompts
        return target.model, target.params, drafters.draft_model(draft.model), draft.params, *self.prompts

    def _adaptively(self, limit: int) -> dict[str, Any]:
        return {
            "verifier": getattr(verify, self.task.verifier)(),
            "controller": self.controller,
            "controller_state": self.learnt,
            "max_new_tokens": self._limits(limit),
            **self.options,
        }

    def _enough(self) -> int:
        """The limit that runs all there is of the loop.

        It is data, so two tokens take the same programs. But XLA readies each branch when it first runs, for up to
        0.1 s on CPU: a controller that takes one or another has a whole run of them.
        """
        one_branch = len(self.controller.buckets) == 1 or self.pair.draft is None
        return 2 if one_branch else self.task.max_new_tokens

    def _limits(self, limit: int) -> np.ndarray:
        # Rows that only fill the batch up stop after their first token.
        limits = np.where(np.arange(len(self.prompts.lengths)) < self.count, limit, 1)
        return np.minimum(limits, self._most).astype(np.int32)


def _capacity(needed: int, positions: int | None) -> int:
    """Tokens a row may hold: in steps, so that runs of similar length find each other's compiled programs, and never
    more than the target has positions."""
    rounded = -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP
    return rounded if positions is None else min(rounded, positions)


class Timed(NamedTuple):
    """Seconds of one batch, medians, and what plain decoding made of it."""

    speculative: float
    plain: float
    turns: list[tuple[float, float]]  # seconds of plain decoding and of speculation, which those are the medians of
    tokens: list[list[int]]


def run_in_turn(batch: Batch, shown: float) -> Timed:
    """Plain decoding and speculation in turn, one call each, as often as patience allows: one short run says little.

    `shown` is what the run that was shown took. It has the host's work for every few rounds in it, which plain decoding
    has not, and counts only where it was long.
    """
    limit = batch.task.max_new_tokens
    if shown > _LONG:
        batch.plain(2)
        took, tokens = _seconds(batch.plain, limit)
        return Timed(shown, took, [(took, shown)], tokens)
    batch.warm_up_calls()
    jobs = {"plain": lambda: _seconds(batch.plain, limit), "speculative": lambda: _seconds(batch.speculate, limit)}
    timed = in_turn(jobs, 1)
    if sum(results[0][0] for results in timed.values()) <= _PATIENCE:
        # XLA readies each branch when it first runs, for up to 0.1 s: in a short turn that is most of the time.
        over = time.perf_counter() + _PATIENCE
        timed = in_turn(jobs, MOST_RUNS, enough=lambda turns: time.perf_counter() > over)
    plain, speculative = ([seconds for seconds, _ in timed[way]] for way in jobs)
    turns = list(zip(plain, speculative, strict=True))
    return Timed(statistics.median(speculative), statistics.median(plain), turns, timed["plain"][0][1])


def _seconds(run: Callable[[int], Generation], limit: int) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    tokens = run(limit).new_tokens()
    return time.perf_counter() - began, tokens
