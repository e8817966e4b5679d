"""Profiles that nobody measured, rounds that nobody ran, and controllers that know the future."""

from __future__ import annotations

import jax.numpy as jnp

from specjax.costs import Costs, Profile
from specjax.types import Controller, Round


def profile(rounds=(1.0, 1.1, 1.2, 1.3), batch=1, buckets=None, change=0.0, context=64):
    """A made-up table: seconds of rounds with 0, 1, ... draft tokens."""
    drafts = tuple(0.05 * k for k in range(len(rounds)))
    found = Costs(batch, context, rounds[0], tuple(rounds), drafts, change)
    return Profile("no device", buckets or tuple(range(len(rounds))), (found,))


def round_of(draft_lengths, num_accepted, num_emitted):
    """As much of a round as controllers read."""
    fields = dict.fromkeys(Round._fields)
    given = {"draft_lengths": draft_lengths, "num_accepted": num_accepted, "num_emitted": num_emitted}
    return Round(**{**fields, **{name: jnp.array(value) for name, value in given.items()}})


def by_plan(plan: list[int]) -> Controller:
    """So many tokens for all rows, round by round: whole rounds without a draft, and drafts after them."""
    lengths = jnp.array(plan)
    return Controller(
        init=lambda batch: jnp.zeros((batch,), jnp.int32),
        draft_len=lambda state, rows: lengths[state % len(plan)],
        update=lambda state, info: state + 1,
        buckets=(0, 1, 3),
    )
