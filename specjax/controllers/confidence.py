"""Stops drafting when the drafter's confidence is low."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax import integers
from specjax.controllers.buckets import longest_draft, up_to
from specjax.types import Array, Controller, Drawn, Rows


def confidence(threshold: float = 0.4, longest: int = 8) -> Controller:
    """Drafts up to K tokens; the first one whose probability under the drafter is below `threshold` is the last.

    The probability is the drafter's own, at temperature 1 and before any filter, so that it has a meaning at
    temperature 0 too. The token that ends a draft stays in it: dropping a token because of its value would bias the
    others. Exact with every verifier: where a draft ends depends on the draft alone.

    Its state is the threshold of each row, [B] float32: traced, so thresholds may differ by row and change without a
    new compilation. `specjax.calibrate` finds the one that costs least on a sample of prompts.

    Args:
      threshold: in 0..1; 0 always drafts K tokens.
      longest: K.

    Raises:
      ValueError: a threshold outside 0..1, or longest below 1.

    Source: the "confidence criterion" of transformers' assisted generation (`assistant_confidence_threshold`, 0.4), and
    Mamou et al., arXiv:2405.04304, who learn the stop.

    >>> confidence(0.3, 8).longest
    8
    """
    threshold = integers.real(threshold, "confidence's threshold", lambda x: 0 <= x <= 1, "in 0..1, a probability")
    return _confidence(threshold, longest_draft(longest, "longest"))


@functools.cache
def _confidence(threshold: float, longest: int) -> Controller:
    def draft_len(state: Array, rows: Rows) -> Array:
        del rows
        return jnp.full(state.shape, longest, jnp.int32)

    def keep_drafting(state: Array, drawn: Drawn, step: Array | int) -> Array:
        del step
        return drawn.confidence >= state  # False for NaN: a drafter without finite logits stops at once

    return Controller(
        init=lambda batch: jnp.full((batch,), threshold, jnp.float32),
        draft_len=draft_len,
        update=lambda state, info: state,
        buckets=up_to(longest, least=1),
        keep_drafting=keep_drafting,
    )
