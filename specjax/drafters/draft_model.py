"""A small language model as the drafter."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from specjax.drafters.draw import draw
from specjax.prefill import prefill
from specjax.rows import last_tokens
from specjax.types import Array, Context, Draft, Drafter, DraftPlan, Model, PyTree, Round


class DraftModelState(NamedTuple):
    """Invariant between rounds: the cache holds all of a row's tokens but the last two."""

    cache: PyTree
    block: PyTree | None = None  # of the round under way only; its first slot is the last but one token


def draft_model(model: Model) -> Drafter:
    """Drafts with `model`, any Model over the target's vocabulary; its parameters are generate's drafter_params.

    Each round begins with a forward over the row's last *two* tokens. After a full acceptance the draft model has
    never seen the last drafted token; feeding two catches up without a step of its own, and every row does the same.

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
        del hidden, longest
        cache = model.init_cache(params, prompts.shape[0], slots)
        # The prompt's last token is the last but one when the first round begins.
        filled = prefill(model, params, prompts, context.rows.prompt_lengths - 1, cache)
        return DraftModelState(filled.cache)

    def propose(params, state: DraftModelState, context: Context, plan: DraftPlan) -> tuple[Draft, DraftModelState]:
        rows = context.rows
        batch = rows.tokens.shape[0]
        block = model.init_block(params, batch, plan.longest + 1)

        second = jnp.ones((batch, 1), jnp.int32)
        out = model.apply(params, last_tokens(rows, 2), state.cache, block, logits_at=second)
        tokens = jnp.zeros((batch, plan.longest), jnp.int32)
        token, law = draw(context, out.logits[:, 0], tokens, 0)
        tokens = tokens.at[:, 0].set(token)
        laws = jnp.zeros((plan.longest, *law.shape), jnp.float32).at[0].set(law)

        def step(index: Array, carry):
            tokens, laws, block = carry
            previous = lax.dynamic_slice_in_dim(tokens, index - 1, 1, 1)
            out = model.apply(params, previous, state.cache, block)
            token, law = draw(context, out.logits[:, 0], tokens, index)
            tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, 1)
            return tokens, lax.dynamic_update_index_in_dim(laws, law, index, 0), out.block

        if plan.keep_drafting is None:
            tokens, laws, block = lax.fori_loop(1, plan.steps, step, (tokens, laws, out.block))
            lengths = plan.lengths
        else:
            go_on = plan.keep_drafting
            first_more = go_on(token, law, 0)

            def stopping_step(carry):
                index, wants_more, lengths, drafted = carry
                tokens, laws, block = step(index, drafted)
                lengths = lengths + wants_more.astype(jnp.int32)
                token = lax.dynamic_index_in_dim(tokens, index, 1, keepdims=False)
                law = lax.dynamic_index_in_dim(laws, index, 0, keepdims=False)
                wants_more = wants_more & (lengths < plan.lengths) & go_on(token, law, index)
                return index + 1, wants_more, lengths, (tokens, laws, block)

            lengths = jnp.minimum(plan.lengths, 1)
            start = (jnp.int32(1), first_more & (lengths < plan.lengths), lengths, (tokens, laws, out.block))
            _, _, lengths, (tokens, laws, block) = lax.while_loop(lambda carry: jnp.any(carry[1]), stopping_step, start)
        return Draft(tokens, lengths, jnp.moveaxis(laws, 0, 1)), DraftModelState(state.cache, block)

    def commit(params, state: DraftModelState, context: Context, info: Round) -> DraftModelState:
        del params, context
        # The block holds the last two tokens and the drafted ones but the last: keeping as many as were emitted
        # leaves out exactly the last two of the new text.
        return DraftModelState(model.commit(state.cache, state.block, info.num_emitted, None))

    return Drafter(init=init, propose=propose, commit=commit, vocab_size=model.vocab_size)
