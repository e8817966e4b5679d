"""As many draft tokens as pay: expected tokens a second, from what was accepted so far and what rounds cost here."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from specjax import costs
from specjax.costs import Profile
from specjax.rows import is_active
from specjax.types import Array, Controller, Round, Rows

# Rounds that drafted, over which evidence fades to 1/e: the recent one follows a shift in the text within a few rounds,
# the long one knows the positions.
_RECENT, _LONG = 8.0, 64.0
_WEIGHT = 2.0  # of what an estimate falls back on, in tested tokens
_MOST_PATIENCE = 256


class ThroughputState(NamedTuple):
    """What was learnt. Counts fade; K is the profile's longest draft."""

    recent_accepted: Array  # [B, K] float32
    recent_tested: Array  # [B, K] float32
    long_accepted: Array  # [B, K] float32
    long_tested: Array  # [B, K] float32
    idle: Array  # [] int32, rounds since the last draft
    patience: Array  # [] int32, rounds without a draft before one is tried again


@functools.cache
def throughput(profile: Profile, *, prior: float = 0.7, exploration: float = 0.01) -> Controller:
    """Drafts the number of tokens, 0 to K, that maximises expected tokens a second for the batch as a whole.

    For each row and position it keeps how often a draft token was accepted when its turn came, recently and for longer.
    Every round it takes, over all active rows, the expected tokens of each draft length, divides by what such a round
    costs for so many rows and so long a text, and takes the best; 0 is a plain decoding step. Rows share a round, so
    they share its draft length; a row's own limit (`max_draft_len`) is counted in.

    While nothing is drafted nothing is learnt, so now and then one token is: so rarely that failures cost the share
    `exploration` of the time, and again at once after a success. Where even a perfect draft could not pay it never is.

    The law of the output is the target's, as with any controller. But as rows decide together, the tokens of a row that
    is *sampled* may be others in other company; with `verify.coupled()`, and at temperature 0, they are not.

    Args:
      profile: what rounds cost here, by `specjax.profile`; K and the buckets are its own.
      prior: acceptance of a draft token before any was tested, in 0..1.
      exploration: in 0..1, of the time.

    Raises:
      ValueError: no usable profile, or a share outside 0..1.

    >>> from specjax.costs import Costs, Profile
    >>> cheap = Costs(1, 64, 1.0, (1.0, 1.2, 1.4), (0.0, 0.2, 0.4), 0.0)
    >>> throughput(Profile("chip", (0, 1, 2), (cheap,))).longest
    2
    """
    costs.check(profile)
    if not (0 <= prior <= 1 and 0 <= exploration <= 1):
        raise ValueError(f"prior and exploration are shares in 0..1, got {prior} and {exploration}.")
    longest = profile.longest
    contexts = profile.contexts()

    def init(batch: int) -> ThroughputState:
        none = jnp.zeros((batch, longest), jnp.float32)
        patience = _patience(profile, batch, exploration)
        return ThroughputState(none, none, none, none, jnp.int32(0), jnp.int32(patience))

    def draft_len(state: ThroughputState, rows: Rows) -> Array:
        batch = rows.lengths.shape[0]
        active = is_active(rows)
        seconds = _seconds(profile, contexts, batch, jnp.max(jnp.where(active, rows.lengths, 0)))
        room = jnp.minimum(rows.limits - rows.lengths - 1, rows.draft_limits)
        tokens = jnp.sum(jnp.where(active[:, None], expected_tokens(state, room, prior), 0.0), 0)  # [K+1]
        best = jnp.argmax(tokens / seconds).astype(jnp.int32)
        tries = (best == 0) & (state.idle >= state.patience) & _can_pay(profile, batch)
        return jnp.broadcast_to(jnp.where(tries, 1, best), (batch,))

    def update(state: ThroughputState, info: Round) -> ThroughputState:
        batch = info.num_emitted.shape[0]
        place = jnp.arange(longest)[None]
        tested = (place < info.draft_lengths[:, None]) & (
            place < jnp.minimum(info.num_accepted + 1, info.num_emitted)[:, None]
        )
        accepted = place < info.num_accepted[:, None]
        took_part = (info.draft_lengths > 0)[:, None]

        def fade(counts: Array, new: Array, rounds: float) -> Array:
            return jnp.where(took_part, counts * math.exp(-1 / rounds) + new, counts)

        drafted = jnp.any(took_part)
        hopeful = 2 * jnp.sum(accepted[:, 0]) >= jnp.sum(tested[:, 0])
        patience = jnp.where(hopeful, 0, _patience(profile, batch, exploration))
        return ThroughputState(
            fade(state.recent_accepted, accepted, _RECENT),
            fade(state.recent_tested, tested, _RECENT),
            fade(state.long_accepted, accepted, _LONG),
            fade(state.long_tested, tested, _LONG),
            jnp.where(drafted, 0, state.idle + 1),
            jnp.where(drafted, patience, state.patience).astype(jnp.int32),
        )

    return Controller(init, draft_len, update, profile.buckets)


def expected_tokens(state: ThroughputState, room: Array, prior: float) -> Array:
    """Tokens that a round is expected to emit with a draft of 0, 1, ..., K: [B, K+1].

    Acceptance of a position is estimated from the row's own recent rounds; those fall back on the position's long
    record over all rows, that on the record of all positions, and that on `prior`. A token is emitted where all before
    it in its draft are accepted, and one more always is.

    Args:
      state: what was learnt.
      room: [B] int32, the most that a row may draft.
      prior: acceptance where nothing is known.
    """
    everywhere = (_WEIGHT * prior + jnp.sum(state.long_accepted)) / (_WEIGHT + jnp.sum(state.long_tested))
    of_place = (_WEIGHT * everywhere + jnp.sum(state.long_accepted, 0)) / (_WEIGHT + jnp.sum(state.long_tested, 0))
    own = (_WEIGHT * of_place + state.recent_accepted) / (_WEIGHT + state.recent_tested)  # [B, K]
    gains = jnp.where(jnp.arange(own.shape[1])[None] < room[:, None], jnp.cumprod(own, 1), 0.0)
    return 1 + jnp.pad(jnp.cumsum(gains, 1), ((0, 0), (1, 0)))


def _seconds(profile: Profile, contexts: list[int], batch: int, live: Array) -> Array:
    """[K+1] float32: what a round of each draft length costs with `live` [] tokens in the longest row."""
    table = jnp.asarray([profile.at(batch, context).rounds for context in contexts], jnp.float32)  # [contexts, K+1]
    if len(contexts) == 1:
        return table[0]
    place = jnp.interp(live.astype(jnp.float32), jnp.asarray(contexts, jnp.float32), jnp.arange(len(contexts) * 1.0))
    low = jnp.clip(place.astype(jnp.int32), 0, len(contexts) - 2)
    share = place - low
    return (1 - share) * table[low] + share * table[low + 1]


def _can_pay(profile: Profile, batch: int) -> bool:
    """Whether any draft length would be faster than none if all of it were accepted."""
    return any(
        max((place + 1) / cost for place, cost in enumerate(found.rounds)) > 1 / found.rounds[0]
        for found in (profile.at(batch, context) for context in profile.contexts())
    )


def _patience(profile: Profile, batch: int, exploration: float) -> int:
    """Rounds without a draft, so many that a failing draft of one token costs the share `exploration` of their time."""
    found = profile.at(batch, profile.contexts()[0])
    step = found.rounds[0]
    extra = max(found.rounds[1] - step, 0.0)
    left = exploration * step - found.catch_up
    return _MOST_PATIENCE if left <= 0 else int(np.clip(math.ceil(extra / left), 1, _MOST_PATIENCE))
