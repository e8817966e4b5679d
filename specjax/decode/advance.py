"""After a round: updates rows, drafter, controller and statistics with the emitted tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.decode import parts
from specjax.decode.context import context_of
from specjax.decode.state import Carry
from specjax.decode.widths import RoundResult, empty_round, pad_round
from specjax.rows import Decision, append, is_active, last_tokens
from specjax.sharding import constrain
from specjax.types import Array, Params, PyTree, Round, Rows, Setup, Stats


class Played(NamedTuple):
    """The result of a round, with the updated carry."""

    carry: Carry
    took_part: Array  # [B] bool, rows that were active
    round: Round
    happened: Array | bool  # whether the target ran; False where all drafts were empty: a plain round comes next


def advance(
    setup: Setup, params: Params, carry: Carry, drafter_state: PyTree, result: RoundResult, happened: Array | bool
) -> Played:
    """The carry after the round."""
    before, controller = carry.rows, setup.controller
    took_part = is_active(before)
    info = result.round
    rows = append_emitted(setup, before, info, result.status)
    # The tokens that the target has read: the root, and all emitted tokens but the last, which is the next root.
    read = jnp.concatenate([last_tokens(before, 1), jnp.maximum(info.tokens[:, :-1], 0)], 1)
    context = context_of(setup, params, rows, result.cache)
    drafter_state = setup.drafter.read(params.drafter, drafter_state, context, read, result.hidden, info.num_emitted)
    info = pad_round(info, empty_round(setup, rows.lengths.shape[0]))
    state = controller.update(carry.controller_state, info)
    parts.check_updated(carry.controller_state, state)
    counts = count(carry.stats, info, took_part)
    if happened is not True:
        now = (carry.controller_state, carry.stats)
        state, counts = jax.tree.map(lambda new, old: jnp.where(happened, new, old), (state, counts), now)
    # A plain round follows a round in which no row had a draft.
    lengths = jnp.where(happened, next_draft_lengths(setup, state, rows), 0)
    return Played(Carry(rows, result.cache, drafter_state, state, lengths, counts), took_part, info, happened)


def append_emitted(setup: Setup, rows: Rows, info: Round, status: Array) -> Rows:
    """The rows with the round's emitted tokens appended."""
    appended = append(rows, jnp.maximum(info.tokens, 0), info.log_probs, Decision(info.num_emitted, status))
    return constrain(setup.model.layout, appended, "rows")


def next_draft_lengths(setup: Setup, controller_state: PyTree, rows: Rows) -> Array:
    """Draft lengths [B] of the next round. Each row leaves room for the token that verification adds."""
    most = jnp.minimum(rows.limits - rows.lengths - 1, rows.draft_limits)
    wanted = setup.controller.draft_len(controller_state, rows)
    parts.check_draft_lengths(wanted, rows.lengths.shape[0])
    lengths = jnp.clip(jnp.minimum(wanted, most), 0, setup.longest)
    return jnp.where(is_active(rows), lengths, 0)


def count(stats: Stats, info: Round, was_active: Array) -> Stats:
    """The counts after the round, by depth."""
    place = jnp.arange(stats.by_longest.shape[1])[None]
    longest = jnp.max(info.draft_lengths)
    was_plain = stats.switches % 2 == 0  # as the start counts as a round without a draft
    was_drafted = place[:, :-1] < info.draft_lengths[:, None]
    # The draft token after the accepted ones was tested too, if a token was emitted in its place.
    num_tested = jnp.minimum(info.num_accepted + 1, info.num_emitted)[:, None]
    took_part = was_active.astype(jnp.int32)
    source = jnp.zeros_like(longest)[None] if info.source is None else info.source
    is_source = source[:, None] == jnp.arange(stats.drafted_by.shape[1])[None]
    return Stats(
        rounds=stats.rounds + took_part,
        emitted=stats.emitted + info.num_emitted,
        drafted=stats.drafted + was_drafted.astype(jnp.int32),
        tested=stats.tested + ((place[:, :-1] < num_tested) & was_drafted).astype(jnp.int32),
        accepted=stats.accepted + (place[:, :-1] < info.num_accepted[:, None]).astype(jnp.int32),
        by_longest=stats.by_longest + jnp.where(place == longest, took_part[:, None], 0),
        drafted_by=stats.drafted_by + jnp.where(is_source, info.draft_lengths[:, None], 0),
        accepted_by=stats.accepted_by + jnp.where(is_source, info.num_accepted[:, None], 0),
        switches=stats.switches + (was_active & (was_plain != (longest == 0))).astype(jnp.int32),
    )
