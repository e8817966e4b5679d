"""The loops that `profiling` times, for one number of rows: rounds, drafting alone, plain steps."""

from __future__ import annotations

import functools
import operator
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.controllers.buckets import holding
from specjax.costs import Costs
from specjax.decode import arguments
from specjax.decode.advance import next_draft_lengths
from specjax.decode.by_hand import start_once
from specjax.decode.loop import run
from specjax.decode.plain import plain_setup
from specjax.decode.round import draft, plan_round
from specjax.decode.start import no_counts
from specjax.decode.state import Carry, Learnt
from specjax.profiling.paired_timing import in_turn
from specjax.types import Array, Controller, Params, Rows, Sampling, Setup

_TOKENS = 96  # emitted at most in a timed loop: the context stays near the one that is asked for
_FEWEST, _MOST = 8, 32  # rounds of such a loop
_SUSTAINED, _MOST_CALLS = 0.3, 20  # seconds that such loops last together, and how many they are at most
_PLAIN, _DRAFTS, _CHANGES = 8, 2, 5  # rounds without a draft, rounds with one after them, and how often in a timed loop
_GROUP = 3  # jobs between two times of a plain step


class _Orders(NamedTuple):
    """So many rounds without a draft, so many with one, and again."""

    size: Array  # [] int32, tokens to draft
    without: Array  # [] int32
    period: Array  # [] int32
    turn: Array  # [] int32


@functools.cache
def forced(buckets: tuple[int, ...]) -> Controller:
    """Drafts what its state says."""

    def draft_len(orders: _Orders, rows: Rows) -> Array:
        drafts = orders.turn % orders.period >= orders.without
        return jnp.broadcast_to(jnp.where(drafts, orders.size, 0), rows.lengths.shape)

    return Controller(
        init=lambda batch: _orders(buckets[-1]),
        draft_len=draft_len,
        update=lambda orders, info: orders._replace(turn=orders.turn + 1),
        buckets=buckets,
    )


def _orders(size: int, without: int = 0, drafts: int = 1) -> _Orders:
    return _Orders(*(jnp.int32(value) for value in (size, without, without + drafts, 0)))


class _Job(NamedTuple):
    run: Callable[..., Any]  # one of those below
    carry: Carry
    turns: int  # rounds, drafts or steps


class Bench:
    """The loops to time, for one number of rows."""

    def __init__(self, setup: Setup, params: Params, sampling: Sampling, batch: int):
        """`setup.capacity` is the longest text in the cache that will be asked for."""
        self.params, self.sampling, self.batch = params, sampling, batch
        grown = (min(max(_TOKENS // (k + 1), _FEWEST), _MOST) * (k + 1) for k in range(setup.longest + 1))
        self.middling = (setup.longest + 1) // 2  # to draft between rounds without
        self.mixed = _PLAIN + _DRAFTS * (self.middling + 1)  # tokens from one change to the next, at most
        capacity = setup.capacity + 2 + max(*grown, _CHANGES * self.mixed)
        if setup.model.max_positions is not None:
            capacity = min(capacity, setup.model.max_positions)
        self.setup = setup._replace(capacity=capacity)

    def _room(self, context: int) -> int:
        """Tokens that a row may emit in a loop: past that it ends, and the loop's last rounds would be empty."""
        return self.setup.capacity - context - 1

    def _rounds(self, draft_len: int, room: int) -> int:
        return min(max(_TOKENS // (draft_len + 1), _FEWEST), _MOST, room // (draft_len + 1))

    def _told(self, carry: Carry, *orders: int) -> Carry:
        told = _orders(*orders)
        return carry._replace(controller_state=told, draft_lengths=next_draft_lengths(self.setup, told, carry.rows))

    def _opened(self, context: int) -> Carry:
        model, capacity = self.setup.model, self.setup.capacity
        prompts = jax.random.randint(jax.random.key(0), (self.batch, context), 0, model.vocab_size)
        request = arguments.request(
            model, prompts, None, key=None, max_new_tokens=capacity - context, sampling=self.sampling, stop_tokens=(),
            seeds=None, capacity=capacity,
        )  # fmt: skip
        return start_once(self.setup, self.params, request.arrays, Learnt())

    def compile(self, context: int) -> None:
        carry = self._opened(context)
        for loop in (_rounds, _drafts, _steps):
            jax.block_until_ready(self._call(loop, carry, 1))

    def time(self, context: int, repeats: int) -> Costs:
        """Medians over `repeats` turns of what each job takes in plain steps of the same turn.

        A target with `max_positions` needs room for two rounds of K + 1 tokens past the context.
        """
        buckets, longest, room = self.setup.controller.buckets, self.setup.longest, self._room(context)
        carry = self._opened(context)
        step = _Job(_steps, carry, min(_MOST, room))
        jobs, changes = self._jobs(carry, room), min(_CHANGES, room // self.mixed)
        names = list(jobs)
        groups = [{name: jobs[name] for name in names[at : at + _GROUP]} for at in range(0, len(names), _GROUP)]
        plain, ratios = self._in_steps(step, [*groups, self._mixed(carry, changes)], repeats)
        middle = {name: statistics.median(values) for name, values in ratios.items()}
        # A wider round costs no less: where noise says so, both cost their mean. And none costs less than a plain step.
        widths = _never_falling([middle["round", k] for k in buckets])
        middle |= {("round", k): max(steps, 1.0) for k, steps in zip(buckets, widths, strict=True)}
        more = (middle["draft", longest] - middle["draft", 1]) / max(longest - 1, 1)
        drafts = (0.0, *(max(middle["draft", 1] + more * k, 0.0) for k in range(longest)))
        rounds = []
        for k in range(longest + 1):
            bucket = holding(buckets, k)
            rounds.append(middle["round", bucket] - (drafts[bucket] - drafts[k]))
        drafts = map(min, drafts, rounds)
        change = 0.0
        if changes > 1:
            more = statistics.median(map(operator.sub, ratios["changes", changes], ratios["changes", 1]))
            change = max(more * (changes * (_PLAIN + _DRAFTS) - 1) / (changes - 1), 0.0)
        rounds, drafts = (tuple(plain * steps for steps in found) for found in (rounds, drafts))
        return Costs(self.batch, context, plain, rounds, drafts, plain * change)

    def _jobs(self, carry: Carry, room: int) -> dict[tuple[str, int], _Job]:
        buckets, longest = self.setup.controller.buckets, self.setup.longest
        jobs = {("round", k): _Job(_rounds, self._told(carry, k), self._rounds(k, room)) for k in buckets}
        jobs |= {("draft", k): _Job(_drafts, self._told(carry, k), _MOST) for k in {1, longest}}
        return jobs

    def _mixed(self, carry: Carry, changes: int) -> dict[tuple[str, int], _Job]:
        """The same rounds in two orders, with so many changes and with one."""
        jobs = {}
        for number in {changes, 1} if changes > 1 else ():
            orders = (self.middling, changes * _PLAIN // number, changes * _DRAFTS // number)
            jobs["changes", number] = _Job(_rounds, self._told(carry, *orders), changes * (_PLAIN + _DRAFTS))
        return jobs

    def _in_steps(
        self, step: _Job, groups: list[dict[tuple[str, int], _Job]], repeats: int
    ) -> tuple[float, dict[tuple[str, int], list[float]]]:
        """Seconds of a plain step; and how many plain steps each job takes, turn by turn.

        A plain step is timed with each group of jobs in each turn, so that a slow minute slows both.
        """
        plain: list[float] = []
        ratios: dict[tuple[str, int], list[float]] = {}
        for group in groups:
            jobs = {None: step, **group}
            timed = in_turn({name: functools.partial(self._seconds, *job) for name, job in jobs.items()}, repeats)
            plain += timed[None]
            ratios |= {name: list(map(operator.truediv, timed[name], timed[None])) for name in group}
        return statistics.median(plain), ratios

    def _seconds(self, run: Callable[..., Any], carry: Carry, count: int) -> float:
        """Of one turn: what loops of so many take longer than loops of one, after one that brings their data near.

        The first turn of a call costs more than a later one (docs/notes/time-a-loop-less-a-loop-of-one.md).
        Loops are repeated until they last as long as a generation does: a machine runs faster for a moment.
        """
        few = max(count // 4, 1)
        once = self._time(run, carry, few, 1) * count / few
        calls = min(max(round(_SUSTAINED / max(once, 1e-6)), 1), _MOST_CALLS)
        one, all_of_them = (self._time(run, carry, turns, calls) for turns in (1, count))
        return max(all_of_them - one, 1e-9) / (calls * (count - 1))

    def _time(self, run: Callable[..., Any], carry: Carry, count: int, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(self._call(run, carry, count))
        return time.perf_counter() - begin

    def _call(self, run: Callable[..., Any], carry: Carry, count: int) -> Any:
        return run(self.setup, self.params, carry, jnp.int32(count))


def _never_falling(values: list[float]) -> list[float]:
    """The nearest sequence that never falls, in least squares: neighbours that fall are pooled.

    >>> _never_falling([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.mean(pools[-2]) > statistics.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [statistics.mean(pool) for pool in pools for _ in pool]


@functools.partial(jax.jit, static_argnums=0)
def _rounds(setup: Setup, params: Params, carry: Carry, count: Array) -> Carry:
    """`count` rounds, as `generate` runs them."""
    done = jnp.int32(0)
    return run(setup, params, carry, done, lambda done, *_: done + 1, lambda rows, done: done < count)[0]


@functools.partial(jax.jit, static_argnums=0)
def _drafts(setup: Setup, params: Params, carry: Carry, count: Array) -> Rows:
    """`count` times the drafting of a round, each after the draft of the one before."""

    def body(_, rows: Rows) -> Rows:
        lengths = next_draft_lengths(setup, carry.controller_state, rows)
        here = carry._replace(rows=rows, draft_lengths=lengths)
        made, _ = draft(setup, params, here, plan_round(setup, here))
        # So that no draft can be left out: the next one begins with what this one drafted last.
        last = jnp.take_along_axis(made.tokens, jnp.maximum(made.lengths - 1, 0)[:, None], 1)
        return rows._replace(tokens=rows.tokens.at[jnp.arange(len(last)), rows.lengths - 1].set(last[:, 0]))

    return lax.fori_loop(0, count, body, carry.rows)


@functools.partial(jax.jit, static_argnums=0)
def _steps(setup: Setup, params: Params, carry: Carry, count: Array) -> Carry:
    """`count` steps of plain decoding, as `autoregressive` runs them."""
    plainly = plain_setup(setup.model, setup.capacity, setup.processor)
    carry = carry._replace(drafter_state=(), controller_state=(), stats=no_counts(carry.rows.lengths.shape[0], 0))
    return _rounds(plainly, params, carry, count)
