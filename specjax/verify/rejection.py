"""Token-level rejection sampling: the original rule of speculative decoding."""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp

from specjax import noise
from specjax.noise import Role
from specjax.sampling import sample
from specjax.types import Array, Context, Draft, Target, Verdict, Verifier
from specjax.verify.prefix import at_place, at_tokens, draft_probs, drafted, num_leading


@functools.cache
def rejection() -> Verifier:
    """Every emitted token follows the target's distribution exactly, with any drafter.

    A draft token x stays with probability min(1, target(x) / draft(x)). At the first rejection the next token is drawn
    from the residual distribution max(target - draft, 0). After a full acceptance it is drawn from the target's own
    distribution (the bonus token). At temperature 0 both distributions are one-hot, and the rule is greedy.

    Sources: Leviathan et al., arXiv:2211.17192, algorithm 1; Chen et al., arXiv:2302.01318, algorithm 2.
    Unlike either, rows stop at their own draft length and a draft without probabilities has a one-hot distribution.

    >>> from specjax.verify import rejection
    >>> rejection() is rejection()
    True
    """
    return Verifier(verify=keep_or_resample)


def keep_or_resample(
    context: Context, draft: Draft, target: Target, also_kept: Array | Literal[False] = False
) -> Verdict:
    """The rule. Draft tokens where `also_kept` [B, K] is True always stay, which makes the rule lossy."""
    rows = context.rows
    longest, width = draft.tokens.shape[1], target.probs.shape[-1]
    drafted_from = draft_probs(draft, width)
    draft_prob, target_prob = (at_tokens(probs, draft.tokens) for probs in (drafted_from, target.probs[:, :longest]))

    accept_keys = noise.derive(rows.keys, Role.ACCEPT, rows.rounds)
    # Strictly less, because the uniform number may be 0: a token of target probability 0 never stays.
    accepted = (noise.uniforms(accept_keys, longest) * draft_prob < target_prob) | also_kept
    num_accepted = num_leading(accepted & drafted(draft))

    target_probs = at_place(target.probs, num_accepted)  # [B, V]
    # Past the draft's end the draft's probabilities count as 0: the residual is then the target's own distribution, for
    # the bonus token.
    rejected_probs = at_place(drafted_from, jnp.minimum(num_accepted, longest - 1))
    rejected_probs = jnp.where((num_accepted < draft.lengths)[:, None], rejected_probs, 0.0)
    residual = jnp.maximum(target_probs - rejected_probs, 0.0)
    # The residual is 0 only where both distributions agree up to rounding; then the target's is as good.
    residual = jnp.where(jnp.sum(residual, -1, keepdims=True) > 0, residual, target_probs)
    residual_keys = noise.derive(rows.keys, Role.RESIDUAL, rows.rounds)
    return Verdict(num_accepted, sample(residual_keys, jnp.log(residual), rows.sampling))
