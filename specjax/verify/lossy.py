"""What both lossy rules do once each draft token is judged. Lossy: the output does not follow the target's law."""

from __future__ import annotations

from specjax import noise
from specjax.noise import Role
from specjax.sampling import sample
from specjax.types import Array, Context, Draft, Target, Verdict
from specjax.verify.prefix import at_place, drafted, num_leading


def keep_judged(context: Context, draft: Draft, target: Target, judged: Array) -> Verdict:
    """Keeps the longest prefix of judged [B, K] draft tokens; the next token comes from the target's law there."""
    rows = context.rows
    num_accepted = num_leading(judged & drafted(draft))
    keys = noise.derive(rows.keys, Role.RESIDUAL, rows.rounds)
    return Verdict(num_accepted, sample(keys, at_place(target.logits, num_accepted), rows.sampling))
