"""Relaxed acceptance (lossy): a draft token stays where it is among the target's k most likely ones."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax import integers
from specjax.types import Context, Draft, Target, Verdict, Verifier
from specjax.verify.prefix import at_tokens
from specjax.verify.rejection import keep_or_resample


def top_k_lossy(k: int = 3) -> Verifier:
    """LOSSY: the output does not follow the target's distribution. Token-level rejection sampling, except that a draft
    token stays in any case if it is one of the k most likely under the target's processed distribution.

    So it accepts at least the tokens that `rejection()` accepts. At temperature 0 the distribution is one-hot, and the
    rule is greedy verification, which is exact.

    Args:
      k: 1 or more.

    >>> top_k_lossy(2) is top_k_lossy(2)
    True
    """
    return _top_k_lossy(integers.static(k, "top_k_lossy's k"))


@functools.cache
def _top_k_lossy(k: int) -> Verifier:
    def verify(context: Context, draft: Draft, target: Target) -> Verdict:
        probs = target.probs[:, : draft.tokens.shape[1]]
        own = at_tokens(probs, draft.tokens)
        rank = jnp.sum(probs > own[..., None], -1)
        return keep_or_resample(context, draft, target, (rank < k) & (own > 0))

    return Verifier(verify=verify)
