"""Typical acceptance (lossy): a draft token stays where the target finds it likely enough for its own uncertainty."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax.types import Context, Draft, Target, Verdict, Verifier
from specjax.verify.lossy import keep_judged
from specjax.verify.prefix import at_tokens


@functools.cache
def typical_lossy(epsilon: float = 0.3, delta: float = 0.09) -> Verifier:
    """LOSSY: the output does not follow the target's law. A draft token stays if its target probability exceeds
    min(epsilon, delta * exp(-entropy of the target's law)).

    Longer accepted drafts for a text that is plausible rather than sampled. At temperature 0 the law is one-hot, and
    the rule is greedy verification, which loses nothing.

    Args:
      epsilon: in (0, 1]; the probability that is always enough.
      delta: above 0; scales the threshold where the target is uncertain.

    Source: Cai et al., Medusa, arXiv:2401.10774, section 2.3.1. Unlike there, the next token is sampled from the
    target's law, and the first draft token is not exempt.

    >>> typical_lossy() is typical_lossy()
    True
    """
    if not (0 < epsilon <= 1 and delta > 0):
        raise ValueError(f"typical_lossy needs epsilon in (0, 1] and delta above 0, got {epsilon} and {delta}.")

    def verify(context: Context, draft: Draft, target: Target) -> Verdict:
        longest = draft.tokens.shape[1]
        probs = target.probs[:, :longest]
        entropy = -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), -1)
        threshold = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
        return keep_judged(context, draft, target, at_tokens(probs, draft.tokens) > threshold)

    return Verifier(verify=verify)
