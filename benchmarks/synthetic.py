"""A pair whose acceptance is set, not learnt: for measuring speed at sizes whose weights nobody has at hand.

The target is of full size, random but for one thing: its output layer is its embedding, moved on by one id, and its
layers add next to nothing. So after token v it is sure of v + 1, by a margin that no rounding bridges, and every pass
still computes and reads all of it. The drafter says v + 1 too, but for a set share of tokens, on which it errs.
Everything else is as always: the verifier compares, and greedy speculation must equal greedy decoding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax import drafters, models
from specjax.cache import after
from specjax.rows import last_tokens
from specjax.types import Context, Draft, Drafter, DraftPlan, Model

SMALL = 1e-4  # of what is added to the residual stream


class Target(NamedTuple):
    """A model and its parameters, made on the device."""

    model: Model
    params: Any


def successor(config: dict[str, Any], key: jax.Array, dtype: Any) -> Target:
    """A Llama with an output layer of its own that follows v with v + 1 (modulo the vocabulary).

    Each tensor is made where it will live, in its dtype: the peak of memory is the parameters plus one tensor.
    """
    built = models.build({**config, "model_type": "llama", "tie_word_embeddings": False})
    flat, structure = jax.tree_util.tree_flatten_with_path(built.abstract)
    names = [jax.tree_util.keystr(path) for path, _ in flat]
    leaves = []
    for index, (name, (_, leaf)) in enumerate(zip(names, flat, strict=True)):
        scale = 1.0 if "embed_tokens" in name else SMALL if "o_proj" in name or "down_proj" in name else 0.02
        leaves.append(_random(jax.random.fold_in(key, index), leaf.shape, jnp.dtype(dtype), scale))
    embedding, head = (next(i for i, name in enumerate(names) if part in name) for part in ("embed_tokens", "lm_head"))
    leaves[head] = jnp.roll(leaves[embedding], 1, 0)
    return Target(built.model, jax.tree.unflatten(structure, leaves))


def drafter(vocab_size: int, alpha: float, cost: Model | None = None) -> Drafter:
    """Drafts what `successor` will say, each token right with probability `alpha`.

    Args:
      vocab_size: the target's.
      alpha: the share of right tokens, in 0..1.
      cost: a model that is run as `draft_model` runs it, for the time it takes; what it says is not used. None drafts
        at no cost. drafter_params are its parameters, or ().
    """
    inner = None if cost is None else drafters.draft_model(cost)

    def propose(params, state, context: Context, plan: DraftPlan):
        right = (last_tokens(context.rows, 1) + 1 + jnp.arange(plan.longest, dtype=jnp.int32)[None]) % vocab_size
        draws = [jax.vmap(jax.random.uniform)(context.draft_keys(step)) for step in range(plan.longest)]
        tokens = jnp.where(jnp.stack(draws, 1) < alpha, right, (right + 1) % vocab_size)
        if inner is not None:
            drafted, state = inner.propose(params, state, context, plan)
            tokens = after(tokens, drafted.tokens)  # or XLA would leave out all that leads to them
        return Draft(tokens, plan.lengths, None), state

    if inner is None:
        return Drafter(propose, vocab_size=vocab_size)
    return inner._replace(propose=propose, vocab_size=vocab_size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    """Matrices of normal numbers; ones for the vectors, which are all norms."""
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)
