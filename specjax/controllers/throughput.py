"""As many draft tokens as pay: expected tokens a second, from what was accepted so far and what rounds cost here."""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import costs, integers
from specjax.controllers import acceptance
from specjax.controllers.acceptance import KINDS
from specjax.controllers.buckets import holding
from specjax.costs import Profile
from specjax.rows import is_active
from specjax.types import Array, Controller, Round, Rows

_log = logging.getLogger(__name__)

_LONG = 256.0  # rounds with a draft, over which what is known of the pair fades to 1/e
_PRIOR, _HOPE = 8.0, 8.0  # rounds that the prior counts for, and easy ones added where it is asked whether drafts pay
_EAGER = 16.0  # times the share of exploration: the most that is put aside for tries
_OF_GAIN = 0.35  # of what drafts usually gain: what is put aside after drafts, within those bounds
_CREDIT = 8.0  # tries that successes may run ahead of what was put aside, by full trust
# Of trust in tries that give hope: the least, and factors for hope that came to nothing and for drafts that pay.
_LEAST_TRUST, _DISTRUST, _TRUST = 1 / 16, 0.7, 1.4
_WITH_HOPE, _WITHOUT = 2.0, 0.7  # factors for the share, after a try
# Rounds without a draft from one decision to the next, where no row ended and no try is due: nothing was learnt in
# them, and deciding takes a tenth of a step of a small model at one row.
_LOOK = 32
_STAKE, _RESERVE = 24.0, 64.0  # plain steps that drafts may lose on the whole, and that savings may pay for on top
# Of what drafts after rounds without one cost on top: what drafts of another width do. (Measured: nothing to a third of
# it at sixteen and one rows, a tenth to a half at four.)
_WIDTH = 0.5
_SPREAD = 0.1  # of a step for each token of a stretch: how much of it is not foreseen, as the kinds of text differ


class ThroughputState(NamedTuple):
    """What was learnt. S is the number of kinds of text, `acceptance.KINDS`."""

    ease: Array  # [B, S] float32, what is believed of each row's text: chances of the kinds
    usual: Array  # [S] float32, rounds of each kind that the pair has seen; they fade
    idle: Array  # [] int32, rounds since the last draft, or since the text began
    took_part: Array  # [] int32, rows in the last round; 0 where a text begins
    last: Array  # [] int32, tokens drafted for a row in that round, at most
    saved: Array  # [] float32, plain steps put aside for the next try; less than 0 is owed for earlier ones
    hot: Array  # [] bool, whether the last draft was a try that gives hope: the next may be on credit
    trust: Array  # [] float32, up to 1: in tries that give hope, as drafts came of them or not
    share: Array  # [] float32, of a plain step that each round without a draft adds to them
    emitted: Array  # [B] int32, tokens since the text began
    account: Array  # [] float32, plain steps: what earlier texts saved, less what this one took until now


def throughput(profile: Profile, *, prior: float = 0.7, exploration: float = 0.01) -> Controller:
    """Drafts the number of tokens, 0 to K, by which the batch as a whole is expected to be done soonest.

    Each row's text is taken to be of one of nine kinds, from hopeless to easy, and to turn to another now and then.
    What is accepted tells the kind within a few rounds, and so what a draft of each length would emit. Where little is
    known of a row, it is as usual for the pair; where little is known of the pair, as the prior says.

    Every round (while nothing is drafted when a row ends, or every 32nd, as deciding takes time too) it takes, for each
    draft length, the rounds that each row would still need, and what such a round costs for so many rows and so long a
    text; and of these the best. 0 is a plain decoding step. Rows share a round, so they share its draft length, and the
    slower rows count for more, as a batch ends with its last row. A row's own limit (`max_draft_len`) is counted in, so
    is what going back to plain steps costs (`Costs.catch_up`), and half of that for going to another width.

    While nothing is drafted nothing is learnt, so now and then one token is. Every round without a draft puts a share
    of its time aside, and when that pays for a try, catching up with the text included, there is one. The share is the
    larger the more drafts gain on the whole, by all that is known of the pair, up to sixteen times `exploration`. A try
    that gives hope doubles it, others cut it to seven tenths, down to `exploration` over the square root of the rows,
    as one try tells of all of them. Hope is where drafts would gain if the rows that the try was right for went on as
    the pair usually does; then the next try is at once, on credit, up to eight tries': this text may have turned easy
    again. A new call owes nothing. Where such credit is used up in vain again and again, credit and share shrink, until
    drafts pay. Where catching up alone takes more than the share, tries are left to the beginning of the next text,
    which drafters have read. Where even a perfect draft could not pay there never is one.

    All this rests on expectations, and it keeps accounts as well: the steps that plain decoding would have taken, less
    those that rounds took by the profile. Drafts may lose 24 plain steps on the whole, of texts before this one too,
    and what earlier drafts saved, up to 64. A pair that has lost so much decodes plainly, except for tries, and from
    there on no more than that least share of its steps may be lost.

    What was learnt is the state, in `Generation.controller_state`: hand it to the next call. The law of the output is
    the target's, as with any controller. But as rows decide together, the tokens of a row that is *sampled* may be
    others in other company; with `verify.coupled()`, and at temperature 0, they are not.

    Args:
      profile: what rounds cost here, by `specjax.profile`; K and the buckets are its own.
      prior: mean acceptance of a draft token before any was tested, in 0..1.
      exploration: in 0..1, of the time, for one row; at 0 nothing is tried.

    Raises:
      ValueError: no usable profile, or a share that is none.

    >>> from specjax.costs import Costs, Profile
    >>> cheap = Costs(1, 64, 1.0, (1.0, 1.2, 1.4), (0.0, 0.2, 0.4), (0.0, 0.0))
    >>> throughput(Profile("chip", (0, 1, 2), (cheap,))).longest
    2
    """
    costs.check(profile)
    prior, exploration = (
        integers.real(share, name, lambda x: 0 <= x <= 1, "a share in 0..1")
        for name, share in (("prior", prior), ("exploration", exploration))
    )
    return _throughput(profile, prior, exploration)


@functools.cache
def _throughput(profile: Profile, prior: float, exploration: float) -> Controller:
    longest, eager = profile.longest, _EAGER * exploration
    easy = np.eye(len(KINDS), dtype=np.float32)[-1]

    def usual(state: ThroughputState, more: np.ndarray | float = 0.0) -> Array:
        """[S], chances of the kinds by all that is known of the pair."""
        counts = jnp.asarray(_PRIOR * acceptance.expected(prior) + more) + state.usual
        return counts / jnp.sum(counts)

    def least(state: ThroughputState) -> float:
        """The share for tries that lead nowhere, of the time."""
        return exploration / math.sqrt(len(state.ease))

    def init(batch: int) -> ThroughputState:
        _warn(profile, batch)
        ease = jnp.broadcast_to(acceptance.expected(prior), (batch, len(KINDS)))
        tries = (jnp.float32(0), jnp.bool_(False), jnp.float32(1), jnp.float32(eager / 2))
        balance = (jnp.zeros((batch,), jnp.int32), jnp.float32(0))
        rounds = (jnp.int32(0), jnp.int32(0), jnp.int32(0))
        return ThroughputState(ease, jnp.zeros((len(KINDS),), jnp.float32), *rounds, *tries, *balance)

    def begin(state: ThroughputState) -> ThroughputState:
        # How the last text went says nothing of the next one, but that it is of the same pair.
        return init(len(state.ease))._replace(
            ease=jnp.broadcast_to(usual(state)[None], state.ease.shape),
            usual=state.usual,
            saved=jnp.maximum(state.saved, 0),
            trust=state.trust,
            share=state.share,
            account=jnp.clip(_balance(state, jnp.zeros_like(state.emitted)), -2 * _STAKE, _RESERVE),
        )

    def usual_costs(batch: int) -> tuple[Array, Array]:
        # Of the shortest text that was measured: constants, and good enough for when to try.
        found = profile.at(batch, profile.contexts()[0])
        return jnp.asarray(found.rounds, jnp.float32), jnp.asarray(found.catch_up, jnp.float32)

    def draft_len(state: ThroughputState, rows: Rows) -> Array:
        batch = rows.lengths.shape[0]
        if not _can_pay(profile, batch):
            return jnp.zeros((batch,), jnp.int32)
        price = _price(state, *usual_costs(batch))
        tries = (state.saved >= price) | (state.hot & (state.saved > (0.5 - _CREDIT * state.trust) * price))
        active = is_active(rows)

        def decide() -> Array:
            seconds, catch_up = _costs(profile, batch, jnp.max(jnp.where(active, rows.lengths, 0)))
            room = jnp.minimum(rows.limits - rows.lengths - 1, rows.draft_limits)
            remaining = jnp.where(active, rows.limits - rows.lengths, 0)
            left = remaining[:, None].astype(jnp.float32)
            once = changes(state, catch_up)
            # What is believed of a row holds for this stretch of its text; after it the text is as usual.
            near = acceptance.stretch(left)  # [B, 1] tokens
            rest = (left - near) * jnp.min(seconds / acceptance.tokens(usual(state), longest))
            rounds = near / _within(acceptance.tokens(state.ease, longest), room)
            needed = _last_row(rounds * seconds[None] + rest, left, seconds[0]) + once  # [K+1]
            # What is expected may be wrong for long, as where one row of many is hopeless; the balance is not.
            best = jnp.where(_balance(state, remaining) > -_STAKE, jnp.argmin(needed), 0).astype(jnp.int32)
            # A row that may draft nothing holds the batch up whatever the others do.
            perfect = 1 + jnp.minimum(jnp.arange(longest + 1)[None], jnp.maximum(room, 0)[:, None]).astype(jnp.float32)
            plain = jnp.max(left) * seconds[0] + once[0]
            could_pay = jnp.min((jnp.max(left / perfect, 0) * seconds + once)[1:]) < plain
            wanted = (tries & (best == 0) & (exploration > 0)) | _is_new(state)
            return jnp.where(could_pay, jnp.where(wanted, 1, best), 0)

        is_due = tries | (state.idle % _LOOK == 0) | (_count(active) != state.took_part)
        return jnp.broadcast_to(lax.cond(is_due, decide, lambda: jnp.int32(0)), (batch,))

    def update(state: ThroughputState, info: Round) -> ThroughputState:
        seen = (info.draft_lengths, info.num_accepted, info.num_emitted)
        size = jnp.max(info.draft_lengths)
        after = lax.cond(size > 0, lambda: learn(state, *seen), lambda: wait(state))
        seconds, catch_up = usual_costs(len(state.ease))
        steps = (seconds + changes(state, catch_up))[size] / seconds[0]
        return after._replace(
            took_part=_count(info.num_emitted > 0),
            last=size,
            emitted=state.emitted + info.num_emitted,
            # Rounds without a draft pay in what may be spent on drafts that do not pay.
            account=state.account - steps + jnp.where(size > 0, 0.0, least(state)),
        )

    def changes(state: ThroughputState, catch_up: Array) -> Array:
        """[K+1] seconds that a round of each draft length takes on top after the last one.

        Who drafts pays for the change where it goes back to plain steps; who does not yet, in the price of tries.
        """
        width = jnp.asarray([holding(profile.buckets, k) for k in range(longest + 1)])
        other = jnp.where(width == width[state.last], 0.0, _WIDTH * catch_up[0])
        drafts = jnp.where(state.last > 0, other, catch_up[1] * state.idle.astype(jnp.float32))
        return drafts.at[0].set(jnp.where(state.last > 0, catch_up[0], 0.0))

    def wait(state: ThroughputState) -> ThroughputState:
        """A round without a draft."""
        in_vain = (state.idle == 0) & (state.saved < -0.5 * _price(state, *usual_costs(len(state.ease))))
        return state._replace(
            idle=state.idle + 1,
            saved=state.saved + state.share,
            hot=jnp.bool_(False),
            trust=jnp.maximum(jnp.where(in_vain, _DISTRUST, 1.0) * state.trust, _LEAST_TRUST),
        )

    def learn(state: ThroughputState, lengths: Array, accepted: Array, emitted: Array) -> ThroughputState:
        """A round with a draft, [B] tokens of each row."""
        seconds, catch_up = usual_costs(len(lengths))
        took_part = lengths > 0
        tested = jnp.minimum(jnp.minimum(accepted + 1, emitted), lengths)
        missed = jnp.broadcast_to(state.idle, lengths.shape)
        before = acceptance.later(state.ease, usual(state), missed)
        now = acceptance.seen(before, jnp.minimum(accepted, tested), tested)
        counts = jnp.sum(jnp.where(took_part[:, None], now, 0.0), 0)
        seen = state._replace(usual=math.exp(-1 / _LONG) * state.usual + counts, idle=jnp.int32(0))
        after = acceptance.later(now, usual(seen), emitted)
        seen = seen._replace(ease=jnp.where(took_part[:, None], after, state.ease))
        hoped = acceptance.tokens(usual(seen, _HOPE * easy), longest)
        tried = (jnp.max(lengths) == 1) & ((state.last == 0) | state.hot)
        own = acceptance.tokens(seen.ease, longest)
        again = _gain(_mean(jnp.where((accepted > 0)[:, None], hoped[None], own), took_part), seconds) > 0
        price = _price(state, seconds, catch_up)
        owed = jnp.minimum(state.saved - price, 0.0)
        # Who drafts on when credit is used up does so because it pays: these were no tries.
        pays = ~tried | (owed < -(_CREDIT * state.trust + 0.5) * price)
        trust = jnp.minimum(jnp.where(pays, _TRUST, 1.0) * state.trust, 1.0)
        most = jnp.clip(trust * _OF_GAIN * _gain(hoped, seconds), least(state), eager)
        share = jnp.clip(jnp.where(again, _WITH_HOPE, _WITHOUT) * state.share, least(state), most)
        return seen._replace(
            saved=jnp.where(pays | _is_new(state), 0.0, owed),  # a pair's first try is free
            hot=tried & again,
            trust=trust,
            share=jnp.where(tried, share, most),
        )

    return Controller(init, draft_len, update, profile.buckets, begin=begin)


def _within(tokens: Array, room: Array) -> Array:
    """[B, K+1]: with drafts cut to [B] `room`."""
    place = jnp.minimum(jnp.arange(tokens.shape[1])[None], jnp.maximum(room, 0)[:, None])
    return jnp.take_along_axis(tokens, place, 1)


def _count(which: Array) -> Array:
    return jnp.sum(which, dtype=jnp.int32)


def _is_new(state: ThroughputState) -> Array:
    """Whether nothing is known: the first draft is a try, and one token tells as much as many."""
    return jnp.sum(state.usual) == 0


def _balance(state: ThroughputState, remaining: Array) -> Array:
    """[] float32, plain steps: how much sooner the batch is done than by plain decoding if there are no more drafts,
    with [B] int32 tokens to come; what earlier texts saved included."""
    by_plain_decoding = jnp.max(remaining + state.emitted)
    return state.account + (by_plain_decoding - jnp.max(remaining)).astype(jnp.float32)


def _last_row(seconds: Array, left: Array, step: Array) -> Array:
    """Seconds until the last row is expected to be done, [K+1], of those that each row is expected to need, [B, K+1],
    for the [B, 1] tokens left to it.

    Which row is the last is not known before: stretches to come are easy or hard. This is the mean of the last when
    each row errs by a Gumbel law, the more the more stretches there are.
    """
    spread = _SPREAD * step * jnp.sqrt(jnp.maximum(jnp.max(left), 1.0) * acceptance.STRETCH)
    return spread * jax.nn.logsumexp(jnp.where(left > 0, seconds / spread, -jnp.inf), axis=0)


def _mean(tokens: Array, rows: Array) -> Array:
    """[K+1]: tokens a round of those [B] rows, by the rounds that they need for a token each."""
    count = jnp.maximum(jnp.sum(rows), 1).astype(jnp.float32)
    return count / jnp.maximum(jnp.sum(jnp.where(rows[:, None], 1 / tokens, 0.0), 0), 1e-6)


def _gain(tokens: Array, seconds: Array) -> Array:
    """[]: by how much the best draft length is faster than none, with `tokens` [K+1] a round; 0.1 is a tenth."""
    return jnp.max(tokens[1:] * seconds[0] / seconds[1:]) - 1


def _price(state: ThroughputState, seconds: Array, catch_up: Array) -> Array:
    """[] float32: what a draft of one token costs now on top of a plain step, in plain steps."""
    late = jnp.where(state.last == 0, catch_up[0] + catch_up[1] * state.idle.astype(jnp.float32), 0.0)
    return (seconds[1] - seconds[0] + late) / seconds[0]


def _warn(profile: Profile, batch: int) -> None:
    """Logs, while tracing, where the profile is not of this."""
    here = jax.devices()[0].device_kind
    if profile.device != here:
        _log.warning("this profile is of %s, and this is %s: measure it here by specjax.profile", profile.device, here)
    measured = sorted({found.batch for found in profile.costs})
    if not measured[0] <= batch <= measured[-1]:
        _log.warning(
            "%d rows, and the profile is of %d to %d: costs are those of the nearest; profile with batch_sizes=(%d,)",
            batch, measured[0], measured[-1], batch,
        )  # fmt: skip


def _costs(profile: Profile, batch: int, live: Array) -> tuple[Array, Array]:
    """What a round of each draft length costs with `live` [] tokens in the longest row, and catching up: [K+1], [2]."""
    contexts = profile.contexts()
    measured = [profile.at(batch, context) for context in contexts]
    table = jnp.asarray([(*found.rounds, *found.catch_up) for found in measured], jnp.float32)  # [contexts, K+3]
    at, places = live.astype(jnp.float32), jnp.asarray(contexts, jnp.float32)
    costs = jax.vmap(lambda times: jnp.interp(at, places, times), 1)(table)
    return costs[:-2], costs[-2:]


def _can_pay(profile: Profile, batch: int) -> bool:
    """Whether any draft length would be faster than none if all of it were accepted."""
    return any(
        max((place + 1) / cost for place, cost in enumerate(found.rounds)) > 1 / found.rounds[0]
        for found in (profile.at(batch, context) for context in profile.contexts())
    )
