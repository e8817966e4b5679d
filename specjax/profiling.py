"""Measuring what rounds cost on this device: the table that `controllers.throughput` decides by."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import specjax
from specjax import costs, parts, plain, validate, verify
from specjax.context import context_of
from specjax.controllers.buckets import up_to
from specjax.costs import Costs, Profile
from specjax.loop import run
from specjax.rounds import State, draft_lengths, plan_of, start
from specjax.types import Array, Controller, Drafter, Model, PyTree, Roles, Rows, Sampling, Verifier

_log = logging.getLogger(__name__)

_TOKENS = 96  # emitted at most in a timed loop: the context stays near the one that is asked for
_FEWEST, _MOST = 8, 32  # rounds of such a loop
_SUSTAINED, _MOST_CALLS = 0.3, 20  # seconds that such loops last together, and how many they are at most
_IDLE = 64  # rounds without a draft, before the one that catches up with a long way
_BREAK, _AFTER, _BREAKS = 8, 2, 5  # rounds without a draft, rounds with one after them, and how often in a timed loop

Busy = Callable[[str], AbstractContextManager[Any]]


def profile(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    *,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int] = (128,),
    longest: int = 8,
    buckets: Sequence[int] | None = None,
    sampling: Sampling = Sampling(),
    verifier: Verifier | None = None,
    repeats: int = 9,
    cache: str | Path | None = None,
    busy: Busy | None = None,
) -> Profile:
    """Times whole rounds with a draft of 0 to K tokens, the drafting in them, and a plain step, on this device.

    Rounds are timed as `generate` runs them, in compiled loops, less what the call takes, and plain steps in between:
    medians of `repeats` turns. That takes half a minute for one row of the shipped pair at one context on two cores;
    compiling comes before. Other work on the machine makes the numbers wrong: measure while it is quiet.

    Args:
      model, params: the target.
      drafter, drafter_params: what drafts.
      batch_sizes: rows at once; between them costs are interpolated. Give those that you will use.
      contexts: tokens in the cache; likewise.
      longest: K, the most that will be drafted.
      buckets: draft lengths that verification is compiled for, from 0 to K; default 0, 1, 2, 3, 5, 8, 16 ... K.
      sampling, verifier: as they will be used; filters and temperatures cost time. Default greedy, `rejection()`.
      repeats: of each measurement.
      cache: a folder. A profile of the same device, versions, shapes and settings that lies there is read instead of
        being measured, and a new one is kept there.
      busy: called with what is going on, for a spinner.

    Returns:
      A Profile, for `controllers.throughput` and `specjax.stats`; `.save(path)` writes it, `costs.load(path)` reads it.

    Raises:
      ValueError: an argument is wrong; the message says what to do.

    >>> import jax, specjax
    >>> from specjax import testing
    >>> model, table = testing.table_model(1, 8), testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> found = specjax.profile(model, table, specjax.drafters.draft_model(model), table, longest=2, repeats=1)
    >>> len(found.costs[0].rounds)
    3
    """
    parts.kinds(model, drafter, verifier)
    validate.at_least_one(repeats, "repeats")
    validate.at_least_one(longest, "longest")
    # Under jit parameters that a function closes over are plain arrays, but whatever is made there is traced.
    if validate.is_traced((params, drafter_params, jnp.zeros(()))):
        raise ValueError("profile runs on the host and cannot be traced: call it outside jit.")
    chosen = tuple(buckets) if buckets is not None else up_to(longest)
    if not chosen or chosen != tuple(sorted(set(chosen))) or chosen[0] != 0 or chosen[-1] != longest:
        raise ValueError(f"buckets must ascend from 0 to longest={longest}, got {chosen}.")
    _check_counts(batch_sizes, "batch_sizes, rows at once,", "(1, 4)")
    _check_counts(contexts, "contexts, tokens in the cache,", "(64, 1024)")
    most = model.max_positions
    if most is not None and max(contexts) + longest >= most:
        raise ValueError(
            f"contexts go up to {max(contexts)}, and with drafts of {longest} the target has places for {most} tokens: "
            "name shorter ones."
        )
    roles = Roles(model, drafter, verifier or verify.rejection(), _forced(chosen))
    parts.fit(model, drafter, roles.verifier, sampling)
    setting = {
        "batch_sizes": list(batch_sizes), "contexts": list(contexts), "buckets": list(chosen),
        "sampling": str(sampling), "verifier": _name(roles.verifier.verify), "drafter": _name(drafter.propose),
        "repeats": repeats,
    }  # fmt: skip
    versions = {"specjax": specjax.__version__, "jax": jax.__version__, "format": str(costs.FORMAT)}
    about = {**versions, **{name: str(value) for name, value in setting.items()}}
    file = None
    if cache is not None:
        file = Path(cache).expanduser() / f"{_digest(about, params, drafter_params)}.json"
        kept = _kept(file)
        if kept is not None:
            return kept
    found: list[Costs] = []
    busy = busy or (lambda what: nullcontext())
    for batch in sorted(set(batch_sizes)):
        bench = _Bench(roles, params, drafter_params, sampling, batch, max(contexts))
        with busy(f"compiling the loops to time, batch {batch}"):
            bench.compile(min(contexts))
        for context in sorted(set(contexts)):
            with busy(f"timing rounds, batch {batch}, {context} tokens in the cache"):
                found.append(bench.time(context, repeats))
    result = Profile(jax.devices()[0].device_kind, chosen, tuple(found), tuple(about.items()))
    costs.check(result)
    odd = [c for c in found if c.rounds[0] > 1.2 * c.plain]
    if odd:
        _log.warning(
            "a round without a draft took %.1f plain steps (batch %d), not one. Was there other work? Measure again. "
            "On a GPU try XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL, which waits less for loops.",
            odd[0].rounds[0] / odd[0].plain, odd[0].batch,
        )  # fmt: skip
    if file is not None:
        result.save(file)
    return result


def _check_counts(values: Any, name: str, example: str) -> None:
    is_sequence = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_sequence or not values or not all(isinstance(x, (int, np.integer)) and x > 0 for x in values):
        raise ValueError(f"{name} must be whole numbers from 1 on, as in {example}; got {values!r}.")


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _digest(about: dict[str, str], params: PyTree, drafter_params: PyTree) -> str:
    """Tells profiles apart: by device, versions, settings, and the shapes of all parameters."""
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", (params, drafter_params))
    said = json.dumps([jax.devices()[0].device_kind, jax.device_count(), about, str(shapes)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _kept(file: Path) -> Profile | None:
    try:
        found = costs.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("measuring again: %s", error)
        return None
    _log.info("profile of %s read from %s", found.device, file)
    return found


class _Orders(NamedTuple):
    """So many rounds without a draft, so many with one, and again."""

    size: Array  # [] int32, tokens to draft
    without: Array  # [] int32
    period: Array  # [] int32
    turn: Array  # [] int32


@functools.cache
def _forced(buckets: tuple[int, ...]) -> Controller:
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


def _told(state: State, *orders: int) -> State:
    return state._replace(controller_state=_orders(*orders))


class _Bench:
    """The loops to time, for one number of rows."""

    def __init__(self, roles: Roles, params, drafter_params, sampling: Sampling, batch: int, widest: int):
        self.roles, self.params, self.drafter_params = roles, params, drafter_params
        self.sampling, self.batch = sampling, batch
        longest = roles.controller.longest
        grown = (self._rounds(k) * (k + 1) for k in range(longest + 1))
        self.middling = (longest + 1) // 2  # to draft between rounds without
        mixed = _BREAKS * (_BREAK + _AFTER * (self.middling + 1))
        self.capacity = widest + 2 + max(*grown, _IDLE + longest, mixed)
        if roles.model.max_positions is not None:
            self.capacity = min(self.capacity, roles.model.max_positions)

    @staticmethod
    def _rounds(draft_len: int) -> int:
        return min(max(_TOKENS // (draft_len + 1), _FEWEST), _MOST)

    def _state(self, context: int) -> State:
        prompts = jax.random.randint(jax.random.key(0), (self.batch, context), 0, self.roles.model.vocab_size)
        request = validate.request(
            self.roles.model, prompts, None, key=None, max_new_tokens=self.capacity - context, sampling=self.sampling,
            stop_tokens=(), seeds=None, capacity=self.capacity,
        )  # fmt: skip
        return _start(self.roles, self.capacity, self.params, self.drafter_params, request.arrays)

    def compile(self, context: int) -> None:
        state = self._state(context)
        for job in (_rounds, _drafts, _steps):
            jax.block_until_ready(self._call(job, state, 1))

    def time(self, context: int, repeats: int) -> Costs:
        state = self._state(context)
        controller = self.roles.controller
        longest = controller.longest
        jobs = {("round", k): (_rounds, _told(state, k), self._rounds(k)) for k in controller.buckets}
        jobs |= {("draft", k): (_drafts, _told(state, k), _MOST) for k in {1, longest}}
        for idle in (1, _IDLE):
            jobs["late", idle] = (_drafts, _told(self._call(_rounds, _told(state, 0), idle), 1), _MOST)
        # The same rounds in two orders, with many changes and with one.
        for breaks in (_BREAKS, 1):
            orders = (self.middling, _BREAKS * _BREAK // breaks, _BREAKS * _AFTER // breaks)
            jobs["breaks", breaks] = (_rounds, _told(state, *orders), _BREAKS * (_BREAK + _AFTER))
        # In turn, plain steps in between: what slows the machine down for a while slows them all.
        steps: list[float] = []
        times: dict[Any, list[float]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for place, (name, job) in enumerate(jobs.items()):
                if place % 3 == 0:
                    steps.append(self._seconds(_steps, state, _MOST))
                times[name].append(self._seconds(*job))
        plain = statistics.median(steps)
        middle = {name: statistics.median(values) for name, values in times.items()}
        # A wider round costs no less: where noise says so, both cost their mean.
        widths = _never_falling([middle["round", k] for k in controller.buckets])
        middle |= {("round", k): max(seconds, plain) for k, seconds in zip(controller.buckets, widths, strict=True)}
        more = (middle["draft", longest] - middle["draft", 1]) / max(longest - 1, 1)
        drafts = (0.0, *(max(middle["draft", 1] + more * k, 0.0) for k in range(longest)))
        rounds = []
        for k in range(longest + 1):
            bucket = min(size for size in controller.buckets if size >= k)
            rounds.append(middle["round", bucket] - (drafts[bucket] - drafts[k]))
        drafts = tuple(min(draft, whole) for draft, whole in zip(drafts, rounds, strict=True))
        soon, late = (max(middle["late", idle] - middle["draft", 1], 0.0) for idle in (1, _IDLE))
        each = max(late - soon, 0.0) / (_IDLE - 1)
        # A change is more than a pass that catches up: cores that plain steps leave idle have to be woken.
        more = statistics.median(map(operator.sub, times["breaks", _BREAKS], times["breaks", 1]))
        change = more * _BREAKS * (_BREAK + _AFTER) / (_BREAKS - 1)
        return Costs(self.batch, context, plain, tuple(rounds), drafts, (max(change, soon - each, 0.0), each))

    def _seconds(self, run: Callable[..., Any], state: State, count: int) -> float:
        """Of one turn: what loops of so many take longer than empty ones, after one that brings their data near.

        Loops are repeated until they last as long as a generation does: a machine runs faster for a moment. (The
        difference between loops of two lengths has several times the variance.)
        """
        few = max(count // 4, 1)
        once = self._time(run, state, few, 1) * count / few
        calls = min(max(round(_SUSTAINED / max(once, 1e-6)), 1), _MOST_CALLS)
        empty, full = (self._time(run, state, turns, calls) for turns in (0, count))
        return max(full - empty, 1e-9) / (calls * count)

    def _time(self, run: Callable[..., Any], state: State, count: int, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(self._call(run, state, count))
        return time.perf_counter() - begin

    def _call(self, run: Callable[..., Any], state: State, count: int) -> Any:
        return run(self.roles, self.capacity, self.params, self.drafter_params, state, jnp.int32(count))


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


_start = jax.jit(start, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rounds(roles: Roles, capacity: int, params, drafter_params, state: State, count: Array) -> State:
    """`count` rounds, as `generate` runs them."""
    return run(
        roles, capacity, params, drafter_params, state, jnp.int32(0), lambda done, took_part, info: done + 1,
        lambda rows, done: done < count,
    )[0]  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drafts(roles: Roles, capacity: int, params, drafter_params, state: State, count: Array) -> Rows:
    """`count` times the drafting of a round, each after the draft of the one before."""
    del capacity

    def body(_, rows: Rows) -> Rows:
        lengths = draft_lengths(roles.controller, state.controller_state, rows)
        plan = plan_of(roles.controller, state.controller_state, lengths)
        context = context_of(roles, rows, state.target_cache)
        draft, _ = roles.drafter.propose(drafter_params, state.drafter_state, context, plan)
        # So that no draft can be left out: the next one begins with what this one drafted last.
        last = jnp.take_along_axis(draft.tokens, jnp.maximum(draft.lengths - 1, 0)[:, None], 1)
        return rows._replace(tokens=rows.tokens.at[jnp.arange(len(last)), rows.lengths - 1].set(last[:, 0]))

    return lax.fori_loop(0, count, body, state.rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(roles: Roles, capacity: int, params, drafter_params, state: State, count: Array) -> Rows:
    """`count` steps of plain decoding, as `autoregressive` runs them."""
    del drafter_params

    def body(_, carry: tuple[Rows, PyTree]) -> tuple[Rows, PyTree]:
        return plain.step(roles.model, roles.processor, capacity, params, *carry)

    return lax.fori_loop(0, count, body, (state.rows, state.target_cache))[0]
