"""Greedy verification: a draft token stays while it is the target's most likely one."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax.types import Context, Draft, Target, Verdict, Verifier


@functools.cache
def greedy() -> Verifier:
    """The output is that of greedy decoding, whatever the drafter; for temperature 0 only.

    Gives what `rejection()` gives at temperature 0, without touching a law.

    >>> from specjax.verify import greedy
    >>> greedy().greedy_only
    True
    """
    return Verifier(verify=_verify, greedy_only=True)


def _verify(context: Context, draft: Draft, target: Target) -> Verdict:
    del context
    best = jnp.argmax(target.logits, -1).astype(jnp.int32)  # [B, K+1]
    longest = draft.tokens.shape[1]
    agrees = (draft.tokens == best[:, :longest]) & (jnp.arange(longest)[None] < draft.lengths[:, None])
    num_accepted = jnp.sum(jnp.cumprod(agrees.astype(jnp.int32), -1), -1)
    next_token = jnp.take_along_axis(best, num_accepted[:, None], 1)[:, 0]
    return Verdict(num_accepted, next_token)
