"""One draft token, drawn as the target would draw it: what every drafter that has logits needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specjax.sampling import sample
from specjax.types import Array, Context, Drawn


def draw(context: Context, logits: Array, drafted: Array, step: Array | int) -> Drawn:
    """The draft token at `step` of a chain, the distribution that it was drawn from, and how sure the drafter was of
    it.

    The drafter's logits go the target's way: the same processors with the draft tokens before this one in view, the
    same temperature, top-k, top-p and min-p. Logits that are not finite, or of which nothing is left, become the
    uniform distribution over the target's vocabulary: a bad drafter costs speed, never correctness.

    Args:
      context: of this round.
      logits: [B, V] float32.
      drafted: [B, K] int32; the first `step` are this round's draft tokens, the others are ignored.
      step: 0..K-1, may be traced.

    Returns:
      A Drawn: token and distribution for `Draft.tokens` and `Draft.probs`, the whole for `DraftPlan.keep_drafting`.
    """
    visible = (jnp.arange(drafted.shape[1]) < step)[None, None]
    processed = context.process(logits[:, None], drafted, visible)[:, 0]
    peak = jnp.max(processed, -1, keepdims=True)
    uniform = jnp.where(jnp.arange(processed.shape[-1])[None] < context.vocab_size, 0.0, -jnp.inf)
    processed = jnp.where(jnp.isfinite(peak), processed, uniform)
    token = sample(context.draft_keys(step), processed, context.rows.sampling)
    own = jnp.take_along_axis(jax.nn.softmax(logits, -1), token[:, None], -1)[:, 0]
    return Drawn(token, jax.nn.softmax(processed, -1), own)
