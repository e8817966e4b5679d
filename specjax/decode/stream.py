"""Streams tokens: the loop of `generate`, one dispatch at a time."""

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

from specjax import integers, logs
from specjax.decode.by_hand import start_once
from specjax.decode.call import Call, prepare
from specjax.decode.calls import names_sampling
from specjax.decode.loop import MOST_ROUNDS, run
from specjax.decode.state import Carry
from specjax.decode.widths import empty_round
from specjax.rows import is_active
from specjax.sharding import Layout, constrain
from specjax.traced import refuse_traced
from specjax.types import (
    Array,
    Controller,
    Drafter,
    Model,
    Params,
    Processor,
    PyTree,
    Round,
    Rows,
    Sampling,
    Setup,
    Stats,
    Status,
    Verifier,
)

_log = logging.getLogger(__name__)


class Origin(enum.IntEnum):
    """Where an emitted token came from."""

    PROMPT_END = 0  # the first token, from the prompt's own forward pass
    ACCEPTED = 1  # drafted, and accepted
    CORRECTED = 2  # from the residual distribution, in place of a rejected draft token
    BONUS = 3  # from the target, after a full acceptance


class LogProb(NamedTuple):
    """The target's log-probability of one token; see `types.LogProbs`."""

    raw: float
    processed: float


class Drafted(NamedTuple):
    """One round's draft for one row, and how much of it was accepted."""

    tokens: list[int]  # the draft, in order
    draft_probs: list[float]  # of each, under the distribution it was drawn from; 1 for an argmax
    target: list[LogProb]  # how likely the target found each, after the draft tokens before it
    accepted: list[int]  # which of them were emitted: 0, 1, ... of a chain, the path of a tree
    num_emitted: int  # the accepted tokens and the corrected or bonus token, which a row that ends may lack
    source: int = 0  # which of `Drafter.names` drafted; -1 for no draft


class Chunk(NamedTuple):
    """The new tokens of one dispatch."""

    tokens: list[list[int]]  # new tokens of each row
    origins: list[list[Origin]]  # where each of them came from
    log_probs: list[list[LogProb]]  # how likely the target found each of them
    rounds: list[list[Drafted]]  # the rounds that each row took part in
    status: np.ndarray  # [B] int32, a `Status`
    stats: Stats  # since the start, NumPy arrays
    controller_state: PyTree = ()  # pass it to the next call, which continues from what was learnt; NumPy arrays


class _Log(NamedTuple):
    """The rounds of one dispatch, [n, B, ...]."""

    took_part: Array  # whether the row did
    round: Round


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
    drafter_state: PyTree | None = None,
    max_draft_len: ArrayLike | None = None,
    stop_tokens: ArrayLike | Sequence[int] = (),
    seeds: ArrayLike | None = None,
    inputs: PyTree | None = None,
    capacity: int | None = None,
    rounds_per_dispatch: int = 1,
) -> Iterator[Chunk]:
    """Yields newly emitted tokens per row, the same tokens as `generate` with the same arguments.

    Each dispatch runs `rounds_per_dispatch` rounds with the state donated. It starts before the host reads the previous
    one, so the device does not wait for the host. Arguments and errors as for `generate`; errors come from this call,
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
    call = prepare(
        model, params, drafter, drafter_params, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens,
        sampling=sampling, processor=processor, verifier=verifier, controller=controller,
        controller_state=controller_state, drafter_state=drafter_state, max_draft_len=max_draft_len,
        stop_tokens=stop_tokens, seeds=seeds, inputs=inputs, capacity=capacity,
    )  # fmt: skip
    refuse_traced("stream runs", "inside jit call specjax.generate.", (call.params, call.request))
    return _chunks(call, rounds_per_dispatch)


def _chunks(call: Call, num_rounds: int) -> Iterator[Chunk]:
    setup, params = call.setup, call.params
    carry = start_once(setup, params, call.request, call.learnt)
    layout = setup.model.layout
    first = (carry.rows._replace(keys=None), carry.stats, carry.controller_state)
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
        carry, log = dispatch(setup, num_rounds, params, carry)
        sent = _copies(layout, (log, carry.rows.status, carry.stats, carry.controller_state))
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
    """Logs the rows that a problem ended."""
    for row, value in enumerate(status.tolist()):
        if Status(value).is_trouble:
            _log.warning("row %d: %s", row, Status(value).describe())


def _read(sent) -> tuple[np.ndarray, Chunk]:
    log, status, stats, learnt = jax.device_get(sent)
    tokens, origins, scores, rounds = ([[] for _ in status] for _ in range(4))
    for index, took_part in enumerate(log.took_part):
        entry: Any = jax.tree.map(lambda leaf: leaf[index].tolist(), log.round)  # a Round of lists  # noqa: B023
        for row in np.flatnonzero(took_part):
            count, accepted = entry.num_emitted[row], entry.num_accepted[row]
            tokens[row] += entry.tokens[row][:count]
            scores[row] += _pairs(*(values[row][:count] for values in entry.log_probs))
            origins[row] += [Origin.ACCEPTED] * accepted
            if count > accepted:
                origins[row].append(Origin.BONUS if entry.at_leaf[row] else Origin.CORRECTED)
            drafted = sum(token >= 0 for token in entry.draft_tokens[row])
            rounds[row].append(
                Drafted(
                    tokens=entry.draft_tokens[row][:drafted],
                    draft_probs=entry.draft_probs[row][:drafted],
                    target=_pairs(*(values[row][:drafted] for values in entry.target_log_probs)),
                    accepted=list(range(accepted)) if entry.path is None else entry.path[row][:accepted],
                    num_emitted=count,
                    source=0 if entry.source is None else entry.source[row],
                )
            )
    return status, Chunk(tokens, origins, scores, rounds, status, stats, learnt)


def _pairs(raw: list[float], processed: list[float]) -> list[LogProb]:
    return [LogProb(*both) for both in zip(raw, processed, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _copies(layout: Layout | None, tree: PyTree) -> PyTree:
    """Copies for the host: the state's own buffers are donated to the next dispatch, and may lie on other hosts."""
    return constrain(layout, jax.tree.map(jnp.copy, tree))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def dispatch(setup: Setup, num_rounds: int, params: Params, carry: Carry) -> tuple[Carry, _Log]:
    """Rounds in one loop on the device until all rows end, `num_rounds` at most; the carry is donated."""
    batch = carry.rows.status.shape[0]
    logs.tracing(
        "stream's rounds", rows=batch, capacity=setup.capacity, draft_len=setup.longest, rounds_per_dispatch=num_rounds
    )
    entry = _Log(jnp.zeros((batch,), bool), empty_round(setup, batch))
    log = jax.tree.map(lambda leaf: jnp.zeros((num_rounds, *leaf.shape), leaf.dtype), entry)

    def record_fn(record, took_part: Array, info: Round):
        index, log = record
        put = functools.partial(lax.dynamic_update_index_in_dim, index=index, axis=0)
        return index + 1, jax.tree.map(put, log, _Log(took_part, info))

    def continue_fn(rows: Rows, record) -> Array:
        return (record[0] < num_rounds) & jnp.any(is_active(rows))

    carry, (_, log) = run(setup, params, carry, (jnp.int32(0), log), record_fn, continue_fn)
    return carry, log
