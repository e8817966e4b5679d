"""Typical acceptance (lossy): a draft token stays if its target probability is above an entropy-dependent threshold."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax import integers, noise
from specjax.noise import Role
from specjax.sampling import sample
from specjax.types import Context, Draft, Target, Verdict, Verifier
from specjax.verify.prefix import at_place, at_tokens, drafted, num_leading


def typical_lossy(epsilon: float = 0.3, delta: float = 0.09) -> Verifier:
    """LOSSY: the output does not follow the target's distribution. A draft token stays if its target probability
    exceeds min(epsilon, delta * exp(-entropy of the target's distribution)).

    More draft tokens are accepted, and the text is plausible but not a sample of the target. At temperature 0 the
    distribution is one-hot, and the rule is greedy verification, which is exact.

    Args:
      epsilon: in (0, 1]; the probability that is always enough.
      delta: above 0; scales the threshold where the target is uncertain.

    Source: Cai et al., Medusa, arXiv:2401.10774, section 2.3.1. Unlike there, the next token is sampled from the
    target's distribution, and the first draft token is not exempt.

    >>> typical_lossy() is typical_lossy()
    True
    """
    epsilon = integers.real(epsilon, "typical_lossy's epsilon", lambda x: 0 < x <= 1, "in (0, 1]")
    return _typical_lossy(epsilon, integers.real(delta, "typical_lossy's delta", lambda x: 0 < x < 1e38, "above 0"))


@functools.cache
def _typical_lossy(epsilon: float, delta: float) -> Verifier:
    def verify(context: Context, draft: Draft, target: Target) -> Verdict:
        longest = draft.tokens.shape[1]
        probs = target.probs[:, :longest]
        entropy = -jnp.sum(jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0), -1)
        threshold = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
        num_accepted = num_leading((at_tokens(probs, draft.tokens) > threshold) & drafted(draft))
        keys = noise.derive(context.rows.keys, Role.RESIDUAL, context.rows.rounds)
        logits = at_place(target.logits, num_accepted)
        return Verdict(num_accepted, sample(keys, logits, context.rows.sampling))

    return Verifier(verify=verify)
