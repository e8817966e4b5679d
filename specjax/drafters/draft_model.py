"""A small language model as the drafter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from specjax.cache import after
from specjax.decode.prefill import prefill
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
    Round,
    Rows,
)

_WIDE = 32  # tokens of a pass that catches up with a long way


class DraftModelState(NamedTuple):
    """Invariant between rounds: the cache holds a row's first `seen` tokens, all but the last two or fewer."""

    cache: PyTree
    seen: Array  # [B] int32
    laws: Array  # [B, K, V] float32, of the last draft: kept, as making room for them anew would cost every round
    block: PyTree | None = None  # of a draft under way only; its first slot is the last but one token


def draft_model(model: Model) -> Drafter:
    """Drafts with `model`, any Model over the target's vocabulary; its parameters are generate's drafter_params.

    Each round begins with a forward over the row's last *two* tokens. After a full acceptance the draft model has
    never seen the last drafted token; feeding two catches up without a step of its own, and every row does the same.
    A round without a draft leaves the model where it is; the next draft begins with passes over what it missed.

    A draft model whose logits are not finite drafts from the uniform law: it costs speed, never correctness.

    Source: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318.
    """

    if not isinstance(model, Model):
        raise ValueError(
            "draft_model wants a specjax.Model: of what models.load or adapters.from_nnx returns, pass `.model` here; "
            f"got {type(model).__name__}."
        )
    return _draft_model(model)


@functools.cache
def _draft_model(model: Model) -> Drafter:
    def init(params, context: Context, prompts: Array, hidden, *, slots: int, longest: int) -> DraftModelState:
        del hidden
        cache = model.init_cache(params, prompts.shape[0], slots)
        # The prompt's last token is the last but one when the first round begins.
        seen = jnp.maximum(context.rows.prompt_lengths - 1, 0)
        filled = prefill(model, params, prompts, seen, cache)
        laws = jnp.zeros((len(seen), longest, filled.logits.shape[-1]), jnp.float32)
        laws = constrain(model.layout, laws, "rows", None, "width")
        return DraftModelState(filled.cache, seen, laws)

    def propose(params, state: DraftModelState, context: Context, plan: DraftPlan) -> tuple[Draft, DraftModelState]:
        rows = context.rows
        batch = rows.tokens.shape[0]
        if plan.may_skip:
            state = _catch_up(model, params, state, rows, plan.longest + 1)

        def add(drafted: _Drafted, index: Array | int, out: Output) -> _Drafted:
            drawn = draw(context, out.logits[:, 0], drafted.tokens, index)
            return _Drafted(
                lax.dynamic_update_slice_in_dim(drafted.tokens, drawn.token[:, None], index, 1),
                lax.dynamic_update_slice_in_dim(drafted.laws, drawn.law[:, None], index, 1),
                out.block,
                drafted.goes_on if plan.keep_drafting is None else plan.keep_drafting(drawn, index),
            )

        def step(index: Array, drafted: _Drafted) -> _Drafted:
            previous = lax.dynamic_slice_in_dim(drafted.tokens, index - 1, 1, 1)
            return add(drafted, index, model.apply(params, previous, state.cache, drafted.block))

        drafted = _Drafted(
            jnp.zeros((batch, plan.longest), jnp.int32),
            state.laws,
            model.init_block(params, batch, plan.longest + 1),
            jnp.ones((batch,), bool),
        )
        second = jnp.ones((batch, 1), jnp.int32)
        out = model.apply(params, last_tokens(rows, 2), state.cache, drafted.block, logits_at=second)
        drafted, lengths = add(drafted, 0, out), plan.lengths
        if plan.keep_drafting is None:
            drafted = lax.fori_loop(1, plan.steps, step, drafted)
        else:
            drafted, lengths = _while_it_goes_on(plan, step, drafted)
        draft = Draft(drafted.tokens, lengths, drafted.laws)
        return draft, state._replace(laws=drafted.laws, block=drafted.block)

    def commit(params, state: DraftModelState, context: Context, info: Round) -> DraftModelState:
        del params, context
        if state.block is None:  # a round without a draft
            return state
        # The block holds the last two tokens and the drafted ones but the last: keeping as many as were emitted
        # leaves out exactly the last two of the new text.
        cache = model.commit(state.cache, state.block, info.num_emitted, None)
        return DraftModelState(cache, state.seen + info.num_emitted, state.laws)

    return Drafter(init=init, propose=propose, commit=commit, vocab_size=model.vocab_size)


class _Drafted(NamedTuple):
    """A draft under way."""

    tokens: Array  # [B, K] int32
    laws: Array  # [B, K, V] float32
    block: PyTree
    goes_on: Array  # [B] bool, what `plan.keep_drafting` said of the last token


def _while_it_goes_on(
    plan: DraftPlan, step: Callable[[Array, _Drafted], _Drafted], drafted: _Drafted
) -> tuple[_Drafted, Array]:
    """Drafts until no row wants more; the draft, and its lengths [B]."""

    def wanting(wanted: Array, lengths: Array, drafted: _Drafted) -> Array:
        return wanted & drafted.goes_on & (lengths < plan.lengths)

    def turn(carry):
        index, wanted, lengths, drafted = carry
        drafted = step(index, drafted)
        lengths = lengths + wanted.astype(jnp.int32)
        return index + 1, wanting(wanted, lengths, drafted), lengths, drafted

    lengths = jnp.minimum(plan.lengths, 1)
    begin = (jnp.int32(1), wanting(jnp.bool_(True), lengths, drafted), lengths, drafted)
    _, _, lengths, drafted = lax.while_loop(lambda carry: jnp.any(carry[1]), turn, begin)
    return drafted, lengths


def _catch_up(model: Model, params: PyTree, state: DraftModelState, rows: Rows, width: int) -> DraftModelState:
    """Before a draft, reads what was emitted without one: all but a row's last two tokens.

    Many of them in wide passes, the rest `width` at a time: a cache has room for a round, K + 1 tokens, past its live
    part, and for a wide pass only where that ends early enough.
    """
    slots = rows.tokens.shape[1]

    def behind(seen: Array) -> Array:
        return jnp.where(is_active(rows), rows.lengths - 2 - seen, 0)

    def read(width: int, carry):
        cache, seen = carry
        place = jnp.minimum(seen[:, None] + jnp.arange(width)[None], slots - 1)
        block = model.init_block(params, len(seen), width)
        tokens, last = jnp.take_along_axis(rows.tokens, place, 1), jnp.full((len(seen), 1), width - 1)
        out = model.apply(params, tokens, cache, block, logits_at=last)
        count = jnp.clip(behind(seen), 0, width)
        return model.commit(cache, out.block, after(count, jnp.argmax(out.logits[:, 0], -1)), None), seen + count

    def is_far(carry) -> Array:
        return jnp.any(behind(carry[1]) > width) & (jnp.max(carry[1]) + _WIDE <= slots)

    def is_behind(carry) -> Array:
        return jnp.any(behind(carry[1]) > 0)

    carry = (state.cache, state.seen)
    if width < _WIDE:
        carry = lax.while_loop(is_far, functools.partial(read, _WIDE), carry)
    cache, seen = lax.while_loop(is_behind, functools.partial(read, width), carry)
    return state._replace(cache=cache, seen=seen)
