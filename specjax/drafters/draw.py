"""Draws one draft token as the target would draw it; for every drafter that has logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specjax.sampling import sample
from specjax.types import Array, Context, Drawn


def draw(context: Context, logits: Array, drafted: Array, step: Array | int) -> Drawn:
    """Draws the draft token at `step` of a chain; with its distribution and the drafter's confidence in it.

    The drafter's logits are processed as the target's: by the same processors, which see the draft tokens before this
    one, and with the same temperature, top-k, top-p and min-p. Logits that are not finite, or all -inf after
    processing, become the uniform distribution over the target's vocabulary: a bad drafter costs speed, never
    correctness.

    Args:
      context: of this round.
      logits: [B, V] float32.
      drafted: [B, K] int32; the first `step` are this round's draft tokens, the others are ignored.
      step: 0..K-1, may be traced.

    Returns:
      A Drawn: its token and probs go into `Draft.tokens` and `Draft.probs`; `DraftPlan.keep_drafting` takes all of it.
    """
    visible = (jnp.arange(drafted.shape[1]) < step)[None, None]
    processed = context.process(logits[:, None], drafted, visible)[:, 0]
    peak = jnp.max(processed, -1, keepdims=True)
    uniform = jnp.where(jnp.arange(processed.shape[-1])[None] < context.vocab_size, 0.0, -jnp.inf)
    processed = jnp.where(jnp.isfinite(peak), processed, uniform)
    token = sample(context.draft_keys(step), processed, context.rows.sampling)
    own = jnp.take_along_axis(jax.nn.softmax(logits, -1), token[:, None], -1)[:, 0]
    return Drawn(token, jax.nn.softmax(processed, -1), own)
