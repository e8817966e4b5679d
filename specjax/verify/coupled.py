"""Coupled verification: target and drafter draw with the same noise, and a draft token stays where they agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from specjax import noise
from specjax.noise import Role
from specjax.sampling import sample
from specjax.types import Context, Draft, Target, Verdict, Verifier
from specjax.verify.prefix import matching


@functools.cache
def coupled() -> Verifier:
    """The output is that of `autoregressive` with the same seeds, token for token, at any temperature, by any drafter.

    The target draws its token at each position by the Gumbel-max rule, with noise addressed by row and position only,
    as in plain decoding. Drafters draw with the same noise, so similar distributions choose the same token. Acceptance
    is a little lower than with `rejection()`: at least (1 - TV) / (1 + TV) a token, where `rejection()` accepts 1 - TV.
    In return a sampled text does not depend on the drafter, the draft length or speculation itself. This needs equal
    logits: use float32, as for greedy decoding.

    Source: Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
    arXiv:2408.07978.

    >>> from specjax.verify import coupled
    >>> coupled().coupled
    True
    """
    return Verifier(verify=_verify, coupled=True)


def _verify(context: Context, draft: Draft, target: Target) -> Verdict:
    rows = context.rows
    places = jnp.arange(draft.tokens.shape[1] + 1)

    def choose(place, logits):  # [B, V]
        return sample(noise.derive(rows.keys, Role.TARGET, rows.lengths + place), logits, rows.sampling)

    return matching(draft, jax.vmap(choose, (0, 1), 1)(places, target.logits))
