"""The speculation loop: rounds with a draft and plain decoding steps, as the controller decides, in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax import parts
from specjax.branches import at_most_once, zeros_like
from specjax.context import context_of
from specjax.rounds import State, at_the_narrowest, count, draft_lengths, moved, plan_of
from specjax.rows import is_active
from specjax.settle import Settled, settle, settle_plainly, widened
from specjax.types import Array, PyTree, Roles, Round, Rows

MOST_ROUNDS = 2**16  # from one look at the rows to the next: a dispatch of a stream keeps a record of each

# What to keep of a round: (kept so far, [B] bool whether a row took part, Round) -> kept.
Note = Callable[[Any, Array, Round], Any]
# Whether there is another round: (rows, kept so far) -> [] bool.
GoesOn = Callable[[Rows, Any], Array]


class _Carry(NamedTuple):
    state: State
    lengths: Array  # [B] int32, tokens to draft for each row in the next round
    kept: PyTree


def run(
    roles: Roles, capacity: int, params: PyTree, drafter_params: PyTree, state: State, kept: PyTree, note: Note,
    goes_on: GoesOn,
) -> tuple[State, PyTree]:  # fmt: skip
    """Rounds for as long as `goes_on` says: draft, verify in one target pass, accept, commit.

    Where nobody has a draft the round is a plain decoding step, if the controller's buckets begin with 0. Such rounds
    have a loop of their own inside the other, so that one after the other costs what plain decoding costs: what is for
    drafts lies outside of it, and on a GPU, where the host waits for each loop's condition, some 20 us, there is one.

    Rows that have ended stay as they are.
    """
    drafter, controller = roles.drafter, roles.controller
    given = (roles, capacity, params, drafter_params, state)
    nothing: Any = nothing_of(*given) if len(controller.buckets) > 1 else None  # traces a draft and a pass

    def after(carry: _Carry, rows: Rows, drafter_state: PyTree, settled: Settled, happened: Array | bool) -> _Carry:
        before, info = carry.state, settled.info
        took_part = is_active(before.rows)
        # For drafters that read them; others leave them out of the program.
        context = context_of(roles, rows, settled.cache)
        learnt = controller.update(before.controller_state, info)
        parts.updated(before.controller_state, learnt)
        then = (learnt, count(before.stats, info, took_part), note(carry.kept, took_part, info))
        if happened is not True:
            now = (before.controller_state, before.stats, carry.kept)
            then = jax.tree.map(lambda new, old: jnp.where(happened, new, old), then, now)
        learnt, stats, kept = then
        drafter_state = drafter.commit(drafter_params, drafter_state, context, info)
        # The turn after a draft of nothing is a plain step.
        lengths = jnp.where(happened, draft_lengths(controller, learnt, rows), 0)
        return _Carry(State(rows, settled.cache, drafter_state, learnt, stats), lengths, kept)

    def drafting(carry: _Carry) -> _Carry:
        state, plan = carry.state, plan_of(controller, carry.state.controller_state, carry.lengths)
        context = context_of(roles, state.rows, state.target_cache)
        draft, drafter_state = drafter.propose(drafter_params, state.drafter_state, context, plan)
        found = Settled(state.target_cache, state.rows.status, nothing)
        settled, happened = at_the_narrowest(roles, capacity, params, state.rows, found, draft)
        return after(carry, moved(roles, state.rows, settled), drafter_state, settled, happened)

    def plainly(carry: _Carry) -> _Carry:
        state = carry.state
        settled = settle_plainly(roles, capacity, params, state.rows, state.target_cache)
        rows = moved(roles, state.rows, settled)  # by one token: as wide as a draft's, it would cost as much
        return after(carry, rows, state.drafter_state, widened(settled, nothing), True)

    def has_next(carry: _Carry) -> Array:
        return goes_on(carry.state.rows, carry.kept)

    def turns(carry: _Carry) -> _Carry:
        carry = lax.while_loop(lambda carry: has_next(carry) & (jnp.max(carry.lengths) == 0), plainly, carry)
        return at_most_once(has_next(carry), drafting, carry)

    carry = _Carry(state, draft_lengths(controller, state.controller_state, state.rows), kept)
    carry = lax.while_loop(has_next, turns if min(controller.buckets) == 0 else drafting, carry)
    return carry.state, carry.kept


def speculate(roles: Roles, capacity: int, params: PyTree, drafter_params: PyTree, state: State) -> tuple[State, Round]:
    """One round."""
    kept = (jnp.bool_(False), nothing_of(roles, capacity, params, drafter_params, state))
    state, (_, info) = run(
        roles, capacity, params, drafter_params, state, kept, lambda kept, took_part, info: (jnp.bool_(True), info),
        lambda rows, kept: ~kept[0],
    )  # fmt: skip
    return state, info


def nothing_of(roles: Roles, capacity: int, params: PyTree, drafter_params: PyTree, state: State) -> Round:
    """A round at the widest in which nothing happened."""

    def widest(state: State) -> Round:
        plan = plan_of(roles.controller, state.controller_state, jnp.zeros_like(state.rows.lengths))
        context = context_of(roles, state.rows, state.target_cache)
        draft, _ = roles.drafter.propose(drafter_params, state.drafter_state, context, plan)
        return settle(roles, capacity, draft.tokens.shape[1], params, state.rows, state.target_cache, draft).info

    return zeros_like(widest, state)
