"""Block verification: the draft is judged as a whole, and on average more of it stays."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax import noise
from specjax.noise import Role
from specjax.sampling import sample
from specjax.types import Array, Context, Draft, Target, Verdict, Verifier
from specjax.verify.prefix import at_place, at_tokens, draft_probs, drafted


@functools.cache
def block() -> Verifier:
    """Emitted tokens follow the target's distribution exactly; on average at least as many stay as with `rejection()`.

    Token-level rejection tests each token by itself. Here the running ratio
    joint_i = min(joint_{i-1} * target(x_i) / draft(x_i), 1) is the probability with which at least i tokens must stay,
    and tokens after an unlikely token can make up for it. The longest prefix i that passes its own test stays. With
    residual_i = sum over x of max(joint_i * target(x) - draft(x), 0), the test passes with probability
    residual_i / (residual_i + 1 - joint_i), and with joint_i at the draft's end. The next token is drawn from that
    residual.

    Which prefix stays depends on draft tokens that are dropped afterwards. Noise that is used again in a later round
    would bias the result, so every round has its own key.

    Source: Sun et al., "Block Verification Accelerates Speculative Decoding", arXiv:2403.10444, algorithm 2. Unlike
    there, rows stop at their own draft length, which may depend on the draft tokens before that end.

    >>> from specjax.verify import block
    >>> block() is block()
    True
    """
    return Verifier(verify=_verify)


def _verify(context: Context, draft: Draft, target: Target) -> Verdict:
    rows = context.rows
    longest, width = draft.tokens.shape[1], target.probs.shape[-1]
    drafted_from = draft_probs(draft, width)  # [B, K, V]
    draft_prob, target_prob = (at_tokens(probs, draft.tokens) for probs in (drafted_from, target.probs[:, :longest]))
    joint = _joint(draft_prob, target_prob)  # [B, K+1]

    # Past the draft's end its distribution is zero: the residual there is the target's own distribution, times joint.
    past_end = jnp.zeros_like(target.probs[:, :1])
    residual = jnp.maximum(joint[..., None] * target.probs - jnp.concatenate([drafted_from, past_end], 1), 0.0)
    mass = jnp.sum(residual, -1)
    rest = mass + 1 - joint
    inside = jnp.where(rest > 0, mass / jnp.where(rest > 0, rest, 1.0), 0.0)
    at_end = jnp.arange(longest + 1)[None] == draft.lengths[:, None]
    passes = jnp.where(at_end, joint, inside)[:, 1:]  # [B, K]

    accept_keys = noise.derive(rows.keys, Role.ACCEPT, rows.rounds)
    passed = (noise.uniforms(accept_keys, longest) < passes) & drafted(draft)
    num_accepted = jnp.max(jnp.where(passed, jnp.arange(1, longest + 1)[None], 0), -1)

    probs = at_place(residual, num_accepted)
    # The residual is 0 only where both distributions agree up to rounding; then the target's is as good.
    probs = jnp.where(jnp.sum(probs, -1, keepdims=True) > 0, probs, at_place(target.probs, num_accepted))
    residual_keys = noise.derive(rows.keys, Role.RESIDUAL, rows.rounds)
    return Verdict(num_accepted, sample(residual_keys, jnp.log(probs), rows.sampling))


def _joint(draft_prob: Array, target_prob: Array) -> Array:
    """[B, K+1]: joint_0 = 1, joint_i = min(joint_{i-1} * ratio_i, 1)."""
    ratio = jnp.where(draft_prob > 0, target_prob / jnp.where(draft_prob > 0, draft_prob, 1.0), 0.0)
    joint = [jnp.ones_like(ratio[:, 0])]
    for place in range(ratio.shape[1]):
        joint.append(jnp.minimum(joint[-1] * ratio[:, place], 1.0))
    return jnp.stack(joint, 1)
