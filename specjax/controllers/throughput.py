"""Chooses the draft length that is expected to end the batch soonest, from the measured costs of rounds."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import costs, integers
from specjax.costs import Profile
from specjax.rows import is_active
from specjax.types import Array, Controller, Round, Rows

# Half or twice as large, each moves the mean cost over the cases of benchmarks/simulate.py by less than 2%
# (`--constant _WAIT=12`). The worst case moves more: 1.25 of the best fixed length with `_LOSS` at 12.
_FADE = 24.0  # tokens: how long a row's acceptance is remembered; a text has easy and hard stretches
_PAIR = 256.0  # tested tokens a row: how long the pair's mean is remembered; this is some texts
_SHRINK = 2.0  # tested tokens: weight of the pair's mean in a row's estimate, and of the prior in the mean
_WAIT = 24  # rounds: the fewest from one probe to the next
_LOSS = 24.0  # plain steps: the most that drafts may lose; earlier gains may pay for as many again


class ThroughputState(NamedTuple):
    """The acceptance learnt so far, the timing of probes, and the ledger of plain steps."""

    tested: Array  # [B] float32, draft tokens that were tested lately
    accepted: Array  # [B] float32, how many of them were accepted
    pair_tested: Array  # [] float32, the same over all rows and earlier texts
    pair_accepted: Array  # [] float32
    wait: Array  # [] int32, n: rounds without a draft before the next probe
    waited: Array  # [] int32, rounds since the last draft, earlier texts included
    last: Array  # [] int32, the longest draft of the last round
    active: Array  # [] int32, rows in the last round; 0 where a text begins
    emitted: Array  # [B] int32, tokens since the text began
    spent: Array  # [] float32, time of this text in plain steps
    ledger: Array  # [] float32, plain steps that drafts gained in earlier texts; below 0 they lost


def throughput(profile: Profile, *, prior: float = 0.7) -> Controller:
    """Drafts the number of tokens, 0 to K, that is expected to end the batch soonest.

    Each row keeps a decayed acceptance estimate, shrunk to the pair's mean. Of all draft lengths, 0 included, the
    controller takes the one that minimises the expected time until the batch's last row ends, by the profile. While
    that is 0, it probes with one token every n rounds; n doubles after a probe that does not pay and starts over after
    one that does. A ledger holds the plain steps that drafts gained or lost: below -24 only probes are allowed. The
    next call starts from the mean, n and the ledger.

    The state is `Generation.controller_state`: pass it to the next call. The output's distribution is the target's, as
    with any controller. But all rows share one decision, so the tokens of a *sampled* row may depend on the other rows
    of the batch; with `verify.coupled()`, and at temperature 0, they do not.

    Args:
      profile: what rounds cost here, by `specjax.profile`; K and the buckets are its own.
      prior: mean acceptance of a draft token before any was tested, in 0..1.

    Raises:
      ValueError: no usable profile, or a prior outside 0..1.

    >>> from specjax.costs import Costs, Profile
    >>> cheap = Costs(1, 64, 1.0, (1.0, 1.2, 1.4), (0.0, 0.2, 0.4), 0.0)
    >>> throughput(Profile("chip", (0, 1, 2), (cheap,))).longest
    2
    """
    costs.check(profile)
    return _throughput(profile, integers.real(prior, "prior", lambda x: 0 <= x <= 1, "a share in 0..1"))


@functools.cache
def _throughput(profile: Profile, prior: float) -> Controller:
    sizes = np.arange(profile.longest + 1)

    def init(batch: int) -> ThroughputState:
        profile.warn_unless_here(batch)
        none, zero = jnp.zeros((batch,), jnp.float32), jnp.int32(0)
        mean = (jnp.float32(_SHRINK), jnp.float32(_SHRINK * prior))
        counts = (jnp.int32(_WAIT), zero, zero, zero, jnp.zeros((batch,), jnp.int32))
        return ThroughputState(none, none, *mean, *counts, jnp.float32(0), jnp.float32(0))

    def begin(state: ThroughputState) -> ThroughputState:
        gained = state.ledger + jnp.max(state.emitted).astype(jnp.float32) - state.spent
        return init(len(state.tested))._replace(
            pair_tested=state.pair_tested,
            pair_accepted=state.pair_accepted,
            wait=state.wait,
            waited=state.waited,
            ledger=jnp.clip(gained, -2 * _LOSS, 2 * _LOSS),
        )

    def draft_len(state: ThroughputState, rows: Rows) -> Array:
        active = is_active(rows)
        left = jnp.where(active, rows.limits - rows.lengths, 0)
        is_due = state.waited >= state.wait

        def decide() -> Array:
            room = jnp.maximum(jnp.minimum(rows.limits - rows.lengths - 1, rows.draft_limits), 0)
            steps, change = in_steps(len(left), jnp.max(jnp.where(active, rows.lengths, 0)))
            ending = jnp.where((state.last > 0) & jnp.asarray(sizes == 0), change, 0.0)
            drafts = jnp.minimum(jnp.asarray(sizes)[None], room[:, None])  # [B, K+1]

            def needed(emitted: Array) -> Array:  # [K+1] plain steps until the last row ends
                return jnp.max(
                    left[:, None].astype(jnp.float32) / jnp.take_along_axis(emitted, drafts, 1) * steps[None], 0
                )

            best = jnp.argmin(needed(tokens(state)) + ending).astype(jnp.int32)
            # A perfect draft of K tokens emits 1 + K tokens: if even that does not pay, there is no probe.
            perfect = needed(jnp.broadcast_to(jnp.asarray(1 + sizes, jnp.float32), drafts.shape)) + ending
            # The batch's gain if there are no more drafts.
            gained = jnp.max(left + state.emitted) - jnp.max(left)
            best = jnp.where(state.ledger + gained.astype(jnp.float32) - state.spent > -_LOSS, best, 0)
            tried = jnp.where(jnp.min(perfect[1:]) < perfect[0], 1, 0)
            return jnp.where((best == 0) & is_due, tried, best)

        # Between probes nothing is learnt, so the decision changes only if a row has ended.
        is_new = jnp.sum(active, dtype=jnp.int32) != state.active
        size = lax.cond((state.last > 0) | is_due | is_new, decide, lambda: jnp.int32(0))
        return jnp.broadcast_to(size, left.shape)

    def update(state: ThroughputState, info: Round) -> ThroughputState:
        size, batch = jnp.max(info.draft_lengths), len(state.tested)
        steps, change = in_steps(batch, jnp.int32(profile.contexts()[0]))
        ending = jnp.where((state.last > 0) & (size == 0), change, 0.0)
        # The draft token after the accepted ones counts as tested too: it was replaced.
        tested = jnp.minimum(jnp.minimum(info.num_accepted + 1, info.num_emitted), info.draft_lengths)
        tested, accepted = (x.astype(jnp.float32) for x in (tested, jnp.minimum(info.num_accepted, tested)))
        fade = (1 - 1 / _FADE) ** info.num_emitted.astype(jnp.float32)
        pair_fade = jnp.exp(-jnp.sum(tested) / (_PAIR * batch))
        seen = state._replace(
            tested=state.tested * fade + tested,
            accepted=state.accepted * fade + accepted,
            pair_tested=state.pair_tested * pair_fade + jnp.sum(tested),
            pair_accepted=state.pair_accepted * pair_fade + jnp.sum(accepted),
            waited=jnp.where(size > 0, 0, state.waited + 1),
            last=size,
            active=jnp.sum(info.num_emitted > 0, dtype=jnp.int32),
            emitted=state.emitted + info.num_emitted,
            spent=state.spent + steps[size] + ending,
        )
        slowest = jnp.min(jnp.where((info.num_emitted > 0)[:, None], tokens(seen), jnp.inf), 0)
        pays = jnp.max((slowest / steps)[1:]) * steps[0] > 1
        # An accepted probe is no failure, even if drafting does not pay yet.
        failed = jnp.min(jnp.where(info.num_emitted > 0, info.num_accepted, 1)) == 0
        wait = jnp.where(pays, _WAIT, jnp.where(failed, jnp.minimum(2 * state.wait, 2**20), state.wait))
        return seen._replace(wait=jnp.where((size > 0) & (state.last == 0), wait, state.wait))

    def tokens(state: ThroughputState) -> Array:
        """[B, K+1] float32: expected tokens of a round of each draft length, 1 + a + ... + a^K for acceptance a."""
        mean = state.pair_accepted / state.pair_tested
        acceptance = (state.accepted + _SHRINK * mean) / (state.tested + _SHRINK)
        return jnp.cumsum(acceptance[:, None] ** jnp.asarray(sizes, jnp.float32)[None], 1)

    def in_steps(batch: int, live: Array) -> tuple[Array, Array]:
        """In plain steps: [K+1] a round of each draft length with `live` [] tokens in the longest row; [] a change."""
        contexts = profile.contexts()
        table = jnp.asarray([(c.plain, c.change, *c.rounds) for c in (profile.at(batch, x) for x in contexts)])
        at = functools.partial(jnp.interp, live.astype(jnp.float32), jnp.asarray(contexts, jnp.float32))
        plain, change, *rounds = jax.vmap(at, 1)(table.astype(jnp.float32))
        return jnp.stack(rounds) / plain, change / plain

    return Controller(init, draft_len, update, profile.buckets, begin=begin)
