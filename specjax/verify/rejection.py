"""Token-level rejection sampling: the founding rule of speculative decoding."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax import noise
from specjax.noise import Role
from specjax.sampling import sample
from specjax.types import Array, Context, Draft, Target, Verdict, Verifier


@functools.cache
def rejection() -> Verifier:
    """Every emitted token follows the target's law exactly, whatever the drafter.

    A draft token x stays with probability min(1, target(x) / draft(x)); at the first rejection the next token comes
    from the residual law max(target - draft, 0), after a full acceptance from the target's own (the bonus token).
    At temperature 0 both laws are one-hot and the rule becomes greedy verification.

    Sources: Leviathan et al., arXiv:2211.17192, algorithm 1; Chen et al., arXiv:2302.01318, algorithm 2.
    Unlike either, rows stop at their own draft length and a draft without probabilities has a one-hot law.

    >>> from specjax.verify import rejection
    >>> rejection() is rejection()
    True
    """
    return Verifier(verify=_verify)


def _verify(context: Context, draft: Draft, target: Target) -> Verdict:
    rows = context.rows
    longest = draft.tokens.shape[1]
    drafted = jnp.arange(longest)[None] < draft.lengths[:, None]  # [B, K]
    target_prob = jnp.take_along_axis(target.probs[:, :longest], draft.tokens[..., None], -1)[..., 0]
    if draft.probs is None:
        draft_prob = jnp.ones_like(target_prob)
    else:
        draft_prob = jnp.take_along_axis(draft.probs, draft.tokens[..., None], -1)[..., 0]

    accept_keys = noise.derive(rows.keys, Role.ACCEPT, rows.rounds)
    # Strictly less: a token of target probability 0 never stays, as u may be 0.
    accepted = (noise.uniforms(accept_keys, longest) * draft_prob < target_prob) & drafted
    num_accepted = jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), -1), -1)

    target_law = jnp.take_along_axis(target.probs, num_accepted[:, None, None], 1)[:, 0]  # [B, V]
    rejected_law = _draft_law_at(draft, num_accepted, target_law.shape[-1])
    residual = jnp.maximum(target_law - rejected_law, 0.0)
    # No mass is left only where both laws agree up to rounding; then either of them is right.
    residual = jnp.where(jnp.sum(residual, -1, keepdims=True) > 0, residual, target_law)
    residual_keys = noise.derive(rows.keys, Role.RESIDUAL, rows.rounds)
    return Verdict(num_accepted, sample(residual_keys, jnp.log(residual), rows.sampling))


def _draft_law_at(draft: Draft, num_accepted: Array, width: int) -> Array:
    """[B, V]: the draft law at the first rejected token; zero where nothing was rejected."""
    at = jnp.minimum(num_accepted, draft.tokens.shape[1] - 1)[:, None]
    if draft.probs is None:
        token = jnp.take_along_axis(draft.tokens, at, 1)
        law = (jnp.arange(width)[None] == token).astype(jnp.float32)
    else:
        law = jnp.take_along_axis(draft.probs, at[..., None], 1)[:, 0]
    return jnp.where((num_accepted < draft.lengths)[:, None], law, 0.0)
