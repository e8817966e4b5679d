"""A small language model as the drafter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.decode.prefill import extend
from specjax.drafters.draw import draw
from specjax.rows import is_active, last_tokens
from specjax.sharding import constrain
from specjax.types import (
    Array,
    Context,
    Draft,
    Drafter,
    DraftPlan,
    Model,
    Output,
    PyTree,
    Rows,
)

_WIDE = 32  # tokens of a pass over much missed text


class DraftModelState(NamedTuple):
    """The draft model's cache and how much text it holds.

    Invariant between rounds with a draft: `read` counts all tokens of the row but the last, and the cache holds all of
    these but the last. After rounds without a draft the cache lacks more.
    """

    cache: PyTree
    read: Array  # [B] int32, tokens passed to `Drafter.read` so far
    cached: Array  # [B] int32, how many of them the cache holds
    probs: Array  # [B, K, V] float32 of the last draft: reused, because a new buffer would cost time in every round
    block: PyTree | None = None  # only while drafting; its first slot is the row's last token but one


def draft_model(model: Model) -> Drafter:
    """Drafts with `model`, any Model over the target's vocabulary; its parameters are generate's drafter_params.

    Each round begins with a forward over the row's last *two* tokens. After a full acceptance the draft model has
    never read the last drafted token. Reading two tokens catches up without an extra step, and every row does the same.
    A round without a draft does not run the draft model; the next draft begins with passes over the missed tokens.

    A draft model whose logits are not finite drafts from the uniform distribution: it costs speed, never correctness.

    Source: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318.
    """

    if not isinstance(model, Model):
        raise ValueError(
            "draft_model takes a specjax.Model: pass the `.model` of what models.load or adapters.from_nnx returned; "
            f"got {type(model).__name__}."
        )
    return _draft_model(model)


@functools.cache
def _draft_model(model: Model) -> Drafter:
    def init(params, batch: int, *, slots: int, longest: int, inputs, learnt) -> DraftModelState:
        del learnt
        cache = model.init_cache(params, batch, slots, *((inputs,) if model.takes_inputs else ()))

        def columns(params, cache) -> Array:
            block = model.init_block(params, batch, 1)
            return model.apply(params, jnp.zeros((batch, 1), jnp.int32), cache, block).logits

        width = jax.eval_shape(columns, params, cache).shape[-1]
        probs = constrain(model.layout, jnp.zeros((batch, longest, width), jnp.float32), "rows", None, "width")
        none = jnp.zeros((batch,), jnp.int32)
        return DraftModelState(cache, none, none, probs)

    def read(params, state: DraftModelState, context: Context, tokens, hidden, keep) -> DraftModelState:
        del hidden
        state = state._replace(read=state.read + keep)
        if state.block is not None:
            # The block holds the row's last two tokens and all drafted ones but the last. Keeping as many as were
            # emitted leaves out exactly the last two tokens of the new text.
            cache = model.commit(state.cache, state.block, keep, None)
            return state._replace(cache=cache, cached=state.cached + keep, block=None)
        if tokens.shape[1] == 1:  # a plain round's token waits for the next draft
            return state
        return _read_on(model, params, state, context.rows, tokens.shape[1])

    def propose(params, state: DraftModelState, context: Context, plan: DraftPlan) -> tuple[Draft, DraftModelState]:
        rows = context.rows
        batch = rows.tokens.shape[0]
        if plan.may_skip:
            state = _catch_up(model, params, state, rows, plan.longest + 1)

        def add(drafted: _Drafted, index: Array | int, out: Output) -> _Drafted:
            drawn = draw(context, out.logits[:, 0], drafted.tokens, index)
            return _Drafted(
                lax.dynamic_update_slice_in_dim(drafted.tokens, drawn.token[:, None], index, 1),
                lax.dynamic_update_slice_in_dim(drafted.probs, drawn.probs[:, None], index, 1),
                out.block,
                drafted.keeps_drafting if plan.keep_drafting is None else plan.keep_drafting(drawn, index),
            )

        def step(index: Array, drafted: _Drafted) -> _Drafted:
            previous = lax.dynamic_slice_in_dim(drafted.tokens, index - 1, 1, 1)
            return add(drafted, index, model.apply(params, previous, state.cache, drafted.block))

        drafted = _Drafted(
            jnp.zeros((batch, plan.longest), jnp.int32),
            state.probs,
            model.init_block(params, batch, plan.longest + 1),
            jnp.ones((batch,), bool),
        )
        second = jnp.ones((batch, 1), jnp.int32)
        out = model.apply(params, last_tokens(rows, 2), state.cache, drafted.block, logits_at=second)
        drafted, lengths = add(drafted, 0, out), plan.lengths
        if plan.keep_drafting is None:
            drafted = lax.fori_loop(1, plan.steps, step, drafted)
        else:
            drafted, lengths = _draft_until_done(plan, step, drafted)
        draft = Draft(drafted.tokens, lengths, drafted.probs)
        return draft, state._replace(probs=drafted.probs, block=drafted.block)

    def defer(state: DraftModelState, keep: Array) -> DraftModelState:
        return state._replace(read=state.read + keep)

    return Drafter(propose, init, read, vocab_size=model.vocab_size, names=("draft_model",), defer=defer)


class _Drafted(NamedTuple):
    """A draft under way."""

    tokens: Array  # [B, K] int32
    probs: Array  # [B, K, V] float32
    block: PyTree
    keeps_drafting: Array  # [B] bool, result of `plan.keep_drafting` for the last token


def _draft_until_done(
    plan: DraftPlan, step: Callable[[Array, _Drafted], _Drafted], drafted: _Drafted
) -> tuple[_Drafted, Array]:
    """Drafts until no row wants more; the draft, and its lengths [B]."""

    def wanting(wanted: Array, lengths: Array, drafted: _Drafted) -> Array:
        return wanted & drafted.keeps_drafting & (lengths < plan.lengths)

    def turn(carry):
        index, wanted, lengths, drafted = carry
        drafted = step(index, drafted)
        lengths = lengths + wanted.astype(jnp.int32)
        return index + 1, wanting(wanted, lengths, drafted), lengths, drafted

    lengths = jnp.minimum(plan.lengths, 1)
    begin = (jnp.int32(1), wanting(jnp.bool_(True), lengths, drafted), lengths, drafted)
    _, _, lengths, drafted = lax.while_loop(lambda carry: jnp.any(carry[1]), turn, begin)
    return drafted, lengths


def _behind(state: DraftModelState) -> Array:
    """[B]: tokens that the cache lacks."""
    return jnp.maximum(state.read - 1 - state.cached, 0)


def _read_on(model: Model, params: PyTree, state: DraftModelState, rows: Rows, width: int) -> DraftModelState:
    """One pass over the next `width` tokens of each row's text; the cache keeps those that it lacks."""
    place = jnp.minimum(state.cached[:, None] + jnp.arange(width)[None], rows.tokens.shape[1] - 1)
    tokens, last = jnp.take_along_axis(rows.tokens, place, 1), jnp.full((len(place), 1), width - 1)
    keep = jnp.minimum(_behind(state), width)
    out = extend(model, params, tokens, state.cache, keep, logits_at=last)
    return state._replace(cache=out.cache, cached=state.cached + keep)


def _catch_up(model: Model, params: PyTree, state: DraftModelState, rows: Rows, width: int) -> DraftModelState:
    """Before a draft: reads the tokens that were emitted without one.

    It reads many tokens in wide passes and the rest `width` at a time. A cache has room for a round, K + 1 tokens, past
    its live part; a wide pass fits only if the live part ends early enough.
    """
    slots = rows.tokens.shape[1]

    def missing(state: DraftModelState) -> Array:
        return jnp.where(is_active(rows), _behind(state), 0)

    def is_far(state: DraftModelState) -> Array:
        return jnp.any(missing(state) > width) & (jnp.max(state.cached) + _WIDE <= slots)

    def is_behind(state: DraftModelState) -> Array:
        return jnp.any(missing(state) > 0)

    if width < _WIDE:
        state = lax.while_loop(is_far, lambda state: _read_on(model, params, state, rows, _WIDE), state)
    return lax.while_loop(is_behind, lambda state: _read_on(model, params, state, rows, width), state)
