"""The target's log-probabilities of the emitted tokens, under its raw and its processed distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specjax.processors import without_padding
from specjax.types import Array, LogProbs


def of_tokens(logits: Array, processed: Array, tokens: Array, vocab_size: int) -> LogProbs:
    """Log-probabilities [B, W] of `tokens` [B, W], each under the logits [B, W, V] of its own place.

    Equal to those of one forward pass over the finished text: a token is scored where it was verified.
    """
    return LogProbs(_pick(without_padding(logits, vocab_size), tokens), _pick(processed, tokens))


def _pick(logits: Array, tokens: Array) -> Array:
    chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)
