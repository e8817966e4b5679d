"""Tokens as they come: the loop of `generate`, one dispatch at a time."""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from specjax import controllers, logs, validate, verify
from specjax.rounds import Roles, State, speculate, start
from specjax.rows import is_active
from specjax.sharding import Layout, constrain, globally
from specjax.types import (
    Array,
    Controller,
    Drafter,
    Model,
    Processor,
    PyTree,
    Round,
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


class Chunk(NamedTuple):
    """What one dispatch brought."""

    tokens: list[list[int]]  # new tokens of each row
    origins: list[list[Origin]]  # where each of them came from
    log_probs: list[list[LogProb]]  # how likely the target found each of them
    status: np.ndarray  # [B] int32, a `Status`
    stats: Stats  # since the start, NumPy arrays


class _Log(NamedTuple):
    """The rounds of one dispatch, [n, B, ...]; unused rounds emit nothing."""

    tokens: Array
    num_emitted: Array
    num_accepted: Array
    draft_lengths: Array
    raw: Array
    processed: Array


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
    validate.at_least_one(rounds_per_dispatch, "rounds_per_dispatch")
    validate.kinds(model, drafter, verifier, controller)
    validate.processor(processor)
    roles = Roles(model, drafter, verifier or verify.rejection(), controller or controllers.fixed(5), processor)
    request = validate.request(
        model, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens, sampling=sampling,
        stop_tokens=stop_tokens, seeds=seeds, capacity=capacity,
    )  # fmt: skip
    validate.roles(model, drafter, roles.verifier, request.arrays.sampling)
    if validate.is_traced((params, drafter_params, request.arrays)):
        raise ValueError("stream runs on the host and cannot be traced: inside jit call specjax.generate.")
    request = request._replace(arrays=globally(model.layout, request.arrays))
    return _chunks(roles, request, params, drafter_params, controller_state, rounds_per_dispatch)


def _chunks(roles, request, params, drafter_params, controller_state, num_rounds) -> Iterator[Chunk]:
    capacity = request.capacity
    state = _start(roles, capacity, params, drafter_params, request.arrays, controller_state)
    layout = roles.model.layout
    rows, stats = jax.device_get(_copies(layout, (state.rows._replace(keys=None), state.stats)))
    spans = [slice(start, end) for start, end in zip(rows.prompt_lengths, rows.lengths, strict=True)]
    head = [row[span].tolist() for row, span in zip(rows.tokens, spans, strict=True)]
    scores = [_pairs(raw[span], own[span]) for raw, own, span in zip(*rows.log_probs, spans, strict=True)]
    status = rows.status
    yield Chunk(head, [[Origin.PROMPT_END] * len(row) for row in head], scores, status, stats)

    pending = None
    while (status == Status.ACTIVE).any():
        state, log = dispatch(roles, capacity, num_rounds, params, drafter_params, state)
        sent = _copies(layout, (log, state.rows.status, state.stats))
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
    log, status, stats = jax.device_get(sent)
    tokens: list[list[int]] = [[] for _ in status]
    origins: list[list[Origin]] = [[] for _ in status]
    scores: list[list[LogProb]] = [[] for _ in status]
    for emitted, num_emitted, num_accepted, draft_lengths, raw, processed in zip(*log, strict=True):
        for row, count in enumerate(num_emitted):
            accepted = num_accepted[row]
            tokens[row] += emitted[row, :count].tolist()
            scores[row] += _pairs(raw[row, :count], processed[row, :count])
            origins[row] += [Origin.ACCEPTED] * accepted
            if count > accepted:
                origins[row].append(Origin.CORRECTED if accepted < draft_lengths[row] else Origin.BONUS)
    return status, Chunk(tokens, origins, scores, status, stats)


def _pairs(raw: np.ndarray, processed: np.ndarray) -> list[LogProb]:
    return [LogProb(*both) for both in zip(raw.tolist(), processed.tolist(), strict=True)]


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
    batch = state.rows.status.shape[0]
    longest = roles.controller.longest
    logs.tracing("stream's rounds", rows=batch, capacity=capacity, draft_len=longest, rounds_per_dispatch=num_rounds)
    shape = jax.eval_shape(lambda state: speculate(roles, capacity, params, drafter_params, state)[1], state)
    none = jnp.zeros((num_rounds, batch), jnp.int32)
    tokens = jnp.zeros((num_rounds, *shape.tokens.shape), jnp.int32)
    scores = jnp.zeros(tokens.shape, jnp.float32)
    log = _Log(tokens, none, none, none, scores, scores)

    def body(carry):
        index, state, log = carry
        state, info = speculate(roles, capacity, params, drafter_params, state)
        entry = _entry(info)
        log = jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, index, 0), log, entry)
        return index + 1, state, log

    def has_more(carry):
        index, state, _ = carry
        return (index < num_rounds) & jnp.any(is_active(state.rows))

    _, state, log = lax.while_loop(has_more, body, (jnp.int32(0), state, log))
    return state, log


def _entry(info: Round) -> _Log:
    return _Log(info.tokens, info.num_emitted, info.num_accepted, info.draft_lengths, *info.log_probs)
