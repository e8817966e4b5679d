"""Tokens as they come: the loop of `generate`, one dispatch at a time."""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from specjax import controllers, integers, logs, parts, validate, verify
from specjax.calls import names_sampling
from specjax.loop import MOST_ROUNDS, nothing_of, run
from specjax.rounds import State, start
from specjax.rows import is_active
from specjax.sharding import Layout, constrain, globally
from specjax.traced import refuse_traced
from specjax.types import (
    Array,
    Controller,
    Drafter,
    LogProbs,
    Model,
    Processor,
    PyTree,
    Roles,
    Round,
    Rows,
    Sampling,
    Stats,
    Status,
    Verifier,
)

_log = logging.getLogger(__name__)


class Origin(enum.IntEnum):
    """Where an emitted token came from."""

    PROMPT_END = 0  # the first token, from the prompt's own forward pass
    ACCEPTED = 1  # drafted, and accepted
    CORRECTED = 2  # from the residual law, in place of a rejected draft token
    BONUS = 3  # from the target, after a full acceptance


class LogProb(NamedTuple):
    """The target's log-probability of one token; see `types.LogProbs`."""

    raw: float
    processed: float


class Drafted(NamedTuple):
    """What one round drafted for one row, and what became of it."""

    tokens: list[int]  # the draft, in order
    draft_probs: list[float]  # of each, under the law it was drawn from; 1 for an argmax
    target: list[LogProb]  # how likely the target found each, after the draft tokens before it
    accepted: list[int]  # which of them were emitted: 0, 1, ... of a chain, the path of a tree
    num_emitted: int  # those, and the corrected or bonus token; without it the row ended on the last of them


class Chunk(NamedTuple):
    """What one dispatch brought."""

    tokens: list[list[int]]  # new tokens of each row
    origins: list[list[Origin]]  # where each of them came from
    log_probs: list[list[LogProb]]  # how likely the target found each of them
    rounds: list[list[Drafted]]  # the rounds that each row took part in
    status: np.ndarray  # [B] int32, a `Status`
    stats: Stats  # since the start, NumPy arrays
    controller_state: PyTree = ()  # to start the next call from what was learnt; NumPy arrays


class _Log(NamedTuple):
    """The rounds of one dispatch, [n, B, ...]: whether the row took part, then fields of `Round`."""

    took_part: Array
    tokens: Array
    num_emitted: Array
    num_accepted: Array
    log_probs: LogProbs
    draft_tokens: Array
    draft_lengths: Array
    draft_probs: Array
    target_log_probs: LogProbs
    path: Array | None


@names_sampling
def stream(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike | None = None,
    *,
    key: Array | None = None,
    max_new_tokens: ArrayLike = 128,
    sampling: Sampling = Sampling(),
    processor: Processor | None = None,
    verifier: Verifier | None = None,
    controller: Controller | None = None,
    controller_state: PyTree | None = None,
    max_draft_len: ArrayLike | None = None,
    stop_tokens: ArrayLike | Sequence[int] = (),
    seeds: ArrayLike | None = None,
    capacity: int | None = None,
    rounds_per_dispatch: int = 1,
) -> Iterator[Chunk]:
    """Yields newly emitted tokens per row, the same tokens as `generate` with the same arguments.

    Each dispatch runs `rounds_per_dispatch` rounds with the state donated, and is sent off before the one before it is
    read, so the device does not wait for the host. Arguments and errors as for `generate`; errors come from this call,
    not from the first `next`.

    >>> import jax, jax.numpy as jnp, specjax
    >>> from specjax import testing
    >>> model = testing.table_model(order=1, vocab_size=8)
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> draft = specjax.drafters.draft_model(model)
    >>> chunks = specjax.stream(model, params, draft, params, jnp.array([[1, 2]]), max_new_tokens=5)
    >>> sum(len(chunk.tokens[0]) for chunk in chunks)
    5
    """
    rounds_per_dispatch = integers.static(rounds_per_dispatch, "rounds_per_dispatch", most=MOST_ROUNDS)
    parts.kinds(model, drafter, verifier, controller)
    parts.processor(processor)
    roles = Roles(model, drafter, verifier or verify.rejection(), controller or controllers.fixed(5), processor)
    request = validate.request(
        model, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens, sampling=sampling,
        max_draft_len=max_draft_len, stop_tokens=stop_tokens, seeds=seeds, capacity=capacity,
    )  # fmt: skip
    parts.fit(model, drafter, roles.verifier, request.arrays.sampling)
    parts.controller_state(roles.controller, controller_state, request)
    refuse_traced("stream runs", "inside jit call specjax.generate.", (params, drafter_params, request.arrays))
    request = request._replace(arrays=globally(model.layout, request.arrays))
    return _chunks(roles, request, params, drafter_params, controller_state, rounds_per_dispatch)


def _chunks(roles, request, params, drafter_params, controller_state, num_rounds) -> Iterator[Chunk]:
    capacity = request.capacity
    state = _start(roles, capacity, params, drafter_params, request.arrays, controller_state)
    layout = roles.model.layout
    first = (state.rows._replace(keys=None), state.stats, state.controller_state)
    rows, stats, learnt = jax.device_get(_copies(layout, first))
    spans = [slice(start, end) for start, end in zip(rows.prompt_lengths, rows.lengths, strict=True)]
    head = [row[span].tolist() for row, span in zip(rows.tokens, spans, strict=True)]
    scores = [
        _pairs(raw[span].tolist(), own[span].tolist()) for raw, own, span in zip(*rows.log_probs, spans, strict=True)
    ]
    status = rows.status
    yield Chunk(
        head, [[Origin.PROMPT_END] * len(row) for row in head], scores, [[] for _ in head], status, stats, learnt
    )

    pending = None
    while (status == Status.ACTIVE).any():
        state, log = dispatch(roles, capacity, num_rounds, params, drafter_params, state)
        sent = _copies(layout, (log, state.rows.status, state.stats, state.controller_state))
        if pending is not None:
            status, chunk = _read(pending)
            yield chunk
        pending = sent
    if pending is not None:
        status, chunk = _read(pending)
        if any(chunk.tokens):
            yield chunk
    warn_of_troubles(status)


def warn_of_troubles(status: np.ndarray) -> None:
    """Logs the rows that ended for a reason that nobody asked for."""
    for row, value in enumerate(status.tolist()):
        if Status(value).is_trouble:
            _log.warning("row %d: %s", row, Status(value).describe())


def _read(sent) -> tuple[np.ndarray, Chunk]:
    log, status, stats, learnt = jax.device_get(sent)
    tokens, origins, scores, rounds = ([[] for _ in status] for _ in range(4))
    for index in range(len(log.took_part)):
        entry: Any = jax.tree.map(lambda leaf: leaf[index].tolist(), log)  # a _Log of lists  # noqa: B023
        for row in (row for row, took_part in enumerate(entry.took_part) if took_part):
            count, accepted, drafted = (
                values[row] for values in (entry.num_emitted, entry.num_accepted, entry.draft_lengths)
            )
            tokens[row] += entry.tokens[row][:count]
            scores[row] += _pairs(*(values[row][:count] for values in entry.log_probs))
            origins[row] += [Origin.ACCEPTED] * accepted
            if count > accepted:
                origins[row].append(Origin.CORRECTED if accepted < drafted else Origin.BONUS)
            rounds[row].append(
                Drafted(
                    tokens=entry.draft_tokens[row][:drafted],
                    draft_probs=entry.draft_probs[row][:drafted],
                    target=_pairs(*(values[row][:drafted] for values in entry.target_log_probs)),
                    accepted=list(range(accepted)) if entry.path is None else entry.path[row][:accepted],
                    num_emitted=count,
                )
            )
    return status, Chunk(tokens, origins, scores, rounds, status, stats, learnt)


def _pairs(raw: list[float], processed: list[float]) -> list[LogProb]:
    return [LogProb(*both) for both in zip(raw, processed, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(roles, capacity, params, drafter_params, request, controller_state) -> State:
    batch, width = request.prompts.shape
    longest = roles.controller.longest
    logs.tracing("stream's prompts", rows=batch, prompt_width=width, capacity=capacity, draft_len=longest)
    return start(roles, capacity, params, drafter_params, request, controller_state)


@functools.partial(jax.jit, static_argnums=0)
def _copies(layout: Layout | None, tree: PyTree) -> PyTree:
    """What the host reads: the state's own buffers are donated to the next dispatch, and may lie on other hosts."""
    return constrain(layout, jax.tree.map(jnp.copy, tree))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def dispatch(roles, capacity, num_rounds, params, drafter_params, state) -> tuple[State, _Log]:
    """Rounds in one loop on the device until all rows end, `num_rounds` at most; the state is donated."""
    batch, longest = state.rows.status.shape[0], roles.controller.longest
    logs.tracing("stream's rounds", rows=batch, capacity=capacity, draft_len=longest, rounds_per_dispatch=num_rounds)

    entry = _entry(nothing_of(roles, capacity, params, drafter_params, state), jnp.zeros((batch,), bool))
    log = jax.tree.map(lambda leaf: jnp.zeros((num_rounds, *leaf.shape), leaf.dtype), entry)

    def note(kept, took_part: Array, info: Round):
        index, log = kept
        entry = _entry(info, took_part)
        return index + 1, jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, index, 0), log, entry)

    def goes_on(rows: Rows, kept) -> Array:
        return (kept[0] < num_rounds) & jnp.any(is_active(rows))

    state, (_, log) = run(roles, capacity, params, drafter_params, state, (jnp.int32(0), log), note, goes_on)
    return state, log


def _entry(info: Round, took_part: Array) -> _Log:
    return _Log(took_part, *(getattr(info, name) for name in _Log._fields[1:]))
