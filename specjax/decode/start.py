"""The start of a generation: makes rows, reads the prompts with target and drafter, emits the first tokens."""

from __future__ import annotations

import jax.numpy as jnp

from specjax.decode.advance import next_draft_lengths
from specjax.decode.arguments import Request
from specjax.decode.context import context_of
from specjax.decode.prefill import prefill
from specjax.decode.round import first_token
from specjax.decode.state import Carry, Learnt
from specjax.rows import open_rows
from specjax.sharding import constrain
from specjax.types import Array, Model, Params, PyTree, Rows, Setup, Stats, Status


def open_request(model: Model, request: Request, slots: int) -> Rows:
    """Fresh rows for a checked request, with room for `slots` tokens each."""
    rows = open_rows(
        request.prompts, request.prompt_lengths, key=request.key, seeds=request.seeds,
        limits=request.prompt_lengths + request.limits, draft_limits=request.draft_limits, sampling=request.sampling,
        stop_tokens=request.stop_tokens, slots=slots, vocab_size=model.vocab_size,
    )  # fmt: skip
    return constrain(model.layout, rows, "rows")


def open_cache(model: Model, params: PyTree, request: Request, slots: int) -> PyTree:
    """The target's empty cache; an encoder reads its inputs here."""
    more = (request.inputs,) if model.takes_inputs else ()
    return model.init_cache(params, request.prompts.shape[0], slots, *more)


def open_slots(setup: Setup, params: Params, request: Request, learnt: Learnt = Learnt()) -> Carry:
    """Empty rows whose status is an ended one; target and drafter have read nothing."""
    opened = _opened(setup, params, request, learnt)
    rows, none = opened.rows, jnp.zeros_like(opened.rows.lengths)
    ended = jnp.full_like(rows.status, Status.LENGTH)
    return opened._replace(rows=rows._replace(lengths=none, prompt_lengths=none, status=ended))


def start(setup: Setup, params: Params, request: Request, learnt: Learnt = Learnt()) -> Carry:
    """Reads the prompts with target and drafter, chunk by chunk, and emits each row's first token."""
    opened = _opened(setup, params, request, learnt)
    drafter, rows = setup.drafter, opened.rows

    def read(state: PyTree, tokens: Array, hidden: tuple[Array, ...], keep: Array, cache: PyTree) -> PyTree:
        return drafter.read(params.drafter, state, context_of(setup, params, rows, cache), tokens, hidden, keep)

    prompt = prefill(
        setup.model, params.target, rows.tokens[:, : request.prompts.shape[1]], rows.lengths, opened.target_cache,
        hidden_layers=drafter.hidden_layers, read=read, state=opened.drafter_state,
    )  # fmt: skip
    rows = first_token(setup, context_of(setup, params, rows, prompt.cache), prompt.logits)
    lengths = next_draft_lengths(setup, opened.controller_state, rows)
    return opened._replace(rows=rows, target_cache=prompt.cache, drafter_state=prompt.state, draft_lengths=lengths)


def _opened(setup: Setup, params: Params, request: Request, learnt: Learnt) -> Carry:
    """Rows with their prompts, and the empty caches and states of before they are read."""
    batch = request.prompts.shape[0]
    rows = open_request(setup.model, request, setup.slots)
    cache = open_cache(setup.model, params.target, request, setup.slots)
    sizes = {"slots": setup.slots, "longest": setup.longest}
    drafter_state = setup.drafter.init(params.drafter, batch, **sizes, inputs=request.inputs, learnt=learnt.drafter)
    state, none = _begin(setup, batch, learnt.controller), jnp.zeros((batch,), jnp.int32)
    return Carry(rows, cache, drafter_state, state, none, no_counts(batch, setup.longest, len(setup.drafter.names)))


def _begin(setup: Setup, batch: int, learnt: PyTree | None) -> PyTree:
    controller = setup.controller
    if learnt is None:
        return controller.init(batch)
    return learnt if controller.begin is None else controller.begin(learnt)


def no_counts(batch: int, longest: int, sources: int = 1) -> Stats:
    """Statistics with all counts 0."""
    none, by_depth = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, longest), jnp.int32)
    by_longest, by_source = (jnp.zeros((batch, size), jnp.int32) for size in (longest + 1, sources))
    return Stats(none, none, by_depth, by_depth, by_depth, by_longest, by_source, by_source, none)
