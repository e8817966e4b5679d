"""One speculation round: draft, verify, accept, commit; and the state that rounds pass on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax import parts
from specjax.branches import at_most_once, zeros_like
from specjax.context import context_of
from specjax.plain import first_token
from specjax.prefill import prefill
from specjax.rows import Decision, append, is_active, open_rows
from specjax.settle import Settled, settle, settle_plainly, widened
from specjax.sharding import constrain
from specjax.types import Array, Controller, Draft, DraftPlan, Model, PyTree, Roles, Round, Rows, Stats
from specjax.validate import Request


class State(NamedTuple):
    """The carry of the speculation loop.

    Invariant between rounds: the target's cache holds all tokens of a row but the last.
    """

    rows: Rows
    target_cache: PyTree
    drafter_state: PyTree
    controller_state: PyTree
    stats: Stats


def start(
    roles: Roles,
    capacity: int,
    params: PyTree,
    drafter_params: PyTree,
    request: Request,
    controller_state: PyTree | None = None,
) -> State:
    """Reads the prompts with target and drafter, and emits each row's first token."""
    model, drafter, _, controller, processor = roles
    batch, _ = request.prompts.shape
    longest = controller.longest
    slots = capacity + longest + 1  # a round writes K+1 slots past the live ones
    rows = open_request(model, request, slots)
    cache = model.init_cache(params, batch, slots)
    prompts = rows.tokens[:, : request.prompts.shape[1]]
    prompt = prefill(model, params, prompts, rows.lengths, cache, drafter.hidden_layers)
    context = context_of(roles, rows, prompt.cache)
    drafter_state = drafter.init(drafter_params, context, prompts, prompt.hidden, slots=slots, longest=longest)
    counts = jnp.zeros((batch, longest), jnp.int32)
    none = jnp.zeros((batch,), jnp.int32)
    return State(
        rows=first_token(model, processor, rows, prompt.logits, capacity),
        target_cache=prompt.cache,
        drafter_state=drafter_state,
        controller_state=_begin(controller, batch, controller_state),
        stats=Stats(none, none, counts, counts, counts, jnp.zeros((batch, longest + 1), jnp.int32)),
    )


def _begin(controller: Controller, batch: int, learnt: PyTree | None) -> PyTree:
    if learnt is None:
        return controller.init(batch)
    return learnt if controller.begin is None else controller.begin(learnt)


class _Turn(NamedTuple):
    """What a round changes before its tokens are appended."""

    target_cache: PyTree
    drafter_state: PyTree
    status: Array  # [B] int32
    info: Round
    is_settled: Array | bool  # whether the target has had its say


def speculate(roles: Roles, capacity: int, params: PyTree, drafter_params: PyTree, state: State) -> tuple[State, Round]:
    """One round: draft, verify in one target pass, accept, commit. Rows that have ended stay as they are.

    Where nobody has a draft it is a plain decoding step, if the controller's buckets begin with 0.
    """
    drafter, controller, rows = roles.drafter, roles.controller, state.rows
    plan = plan_of(controller, state.controller_state, rows)

    def propose(carry: _Turn, rows: Rows) -> tuple[Draft, PyTree]:
        context = context_of(roles, rows, carry.target_cache)
        return drafter.propose(drafter_params, carry.drafter_state, context, plan)

    def info_of(carry: _Turn, rows: Rows) -> Round:
        draft, _ = propose(carry, rows)
        return settle(roles, capacity, draft.tokens.shape[1], params, rows, carry.target_cache, draft).info

    def note(rows: Rows, drafter_state: PyTree, settled: Settled, is_settled: Array | bool) -> _Turn:
        # For drafters that read them; others leave them out of the program.
        after = context_of(roles, _moved(roles, rows, settled), settled.cache)
        drafter_state = drafter.commit(drafter_params, drafter_state, after, settled.info)
        return _Turn(settled.cache, drafter_state, settled.status, settled.info, is_settled)

    def drafting(carry: _Turn, rows: Rows) -> _Turn:
        draft, drafter_state = propose(carry, rows)
        # Zeros of its own: what is read of a carry must be carried, even what nothing needs but a trace.
        nothing = jax.tree.map(jnp.zeros_like, carry.info)
        found = Settled(carry.target_cache, carry.status, nothing)
        settled = _at_the_narrowest(roles, capacity, params, rows, found, draft)
        return note(rows, drafter_state, settled, jnp.any(_drafted(rows, draft) > 0) if plan.may_skip else True)

    def plainly(carry: _Turn, rows: Rows) -> _Turn:
        settled = widened(settle_plainly(roles, capacity, params, rows, carry.target_cache), carry.info)
        return note(rows, carry.drafter_state, settled, jnp.bool_(True))

    turn = _Turn(state.target_cache, state.drafter_state, rows.status, None, jnp.bool_(False))  # type: ignore[arg-type]
    if len(controller.buckets) > 1:
        turn = turn._replace(info=zeros_like(info_of, turn, rows))
    if plan.may_skip:
        # Two loops of one turn or none. On a GPU the host waits for each loop's condition, some 20 us, so a round
        # without a draft should come to few of them: all that is for drafts is inside the first.
        turn = at_most_once(jnp.asarray(plan.steps > 0), drafting, turn, rows)
        turn = at_most_once(jnp.logical_not(turn.is_settled), plainly, turn, rows)
    else:
        turn = drafting(turn, rows)
    info = turn.info
    controller_state = controller.update(state.controller_state, info)
    parts.updated(state.controller_state, controller_state)
    next_state = State(
        rows=_moved(roles, rows, Settled(turn.target_cache, turn.status, info)),
        target_cache=turn.target_cache,
        drafter_state=turn.drafter_state,
        controller_state=controller_state,
        stats=_count(state.stats, info, is_active(rows)),
    )
    return next_state, info


def _drafted(rows: Rows, draft: Draft) -> Array:
    """[B]: lengths of drafts that count."""
    return jnp.where(is_active(rows), draft.lengths, 0)


def _moved(roles: Roles, rows: Rows, settled: Settled) -> Rows:
    """The rows after the round."""
    info = settled.info
    decision = Decision(info.num_emitted, settled.status)
    return constrain(roles.model.layout, append(rows, jnp.maximum(info.tokens, 0), info.log_probs, decision), "rows")


def _at_the_narrowest(roles: Roles, capacity: int, params: PyTree, rows: Rows, found: Settled, draft: Draft) -> Settled:
    """Settles the draft at the first of the controller's buckets that holds it; nothing else runs. One without a token
    is left to a plain step, where there are any: then `found` comes back, which has the target's cache as it is.

    A choice of one among several, made of loops of one turn or none: XLA copies the caches into `lax.switch` and out of
    it again, whole, in every round (16 of the 24 copies of a branch on CPU), and leaves them in place in a loop.
    """
    widest = draft.tokens.shape[1]
    # A tree of fewer nodes is another tree, and not for the loop to choose.
    narrower = () if draft.parents is not None else (size for size in roles.controller.buckets if 0 < size < widest)
    widths = [*narrower, widest]

    def at(width: int) -> Callable[[Settled, Rows, Draft], Settled]:
        return lambda found, rows, draft: widened(
            settle(roles, capacity, width, params, rows, found.cache, draft), found.info
        )

    # Only what changes is carried: XLA copies a carried buffer that is read before the loop and after it.
    plain_steps = min(roles.controller.buckets) == 0
    if len(widths) == 1 and not plain_steps:
        return settle(roles, capacity, widest, params, rows, found.cache, draft)
    needed = jnp.max(_drafted(rows, draft))
    chosen = jnp.searchsorted(jnp.asarray(widths, jnp.int32), needed, method="compare_all")
    for index, width in enumerate(widths):
        is_next = (chosen == index) & (needed > 0) if plain_steps else chosen == index
        found = at_most_once(is_next, at(width), found, rows, draft)
    return found


def open_request(model: Model, request: Request, slots: int) -> Rows:
    """Fresh rows for a checked request, with room for `slots` tokens each."""
    rows = open_rows(
        request.prompts, request.prompt_lengths, key=request.key, seeds=request.seeds,
        limits=request.prompt_lengths + request.limits, draft_limits=request.draft_limits, sampling=request.sampling,
        stop_tokens=request.stop_tokens, slots=slots, vocab_size=model.vocab_size,
    )  # fmt: skip
    return constrain(model.layout, rows, "rows")


def plan_of(controller: Controller, state: PyTree, rows: Rows) -> DraftPlan:
    """Draft lengths for this round; a row never drafts past its limits, less the token that verification adds."""
    most = jnp.minimum(rows.limits - rows.lengths - 1, rows.draft_limits)
    wanted = controller.draft_len(state, rows)
    parts.draft_lengths(wanted, rows.lengths.shape[0])
    lengths = jnp.clip(jnp.minimum(wanted, most), 0, controller.longest)
    lengths = jnp.where(is_active(rows), lengths, 0)
    buckets = controller.buckets
    steps = jnp.maximum(jnp.max(lengths), min(buckets)) if len(buckets) > 1 else controller.longest
    rule = controller.keep_drafting
    keep_drafting = None if rule is None else lambda drawn, step: rule(state, drawn, step)
    return DraftPlan(lengths, controller.longest, steps, min(buckets) == 0, keep_drafting)


def _count(stats: Stats, info: Round, was_active: Array) -> Stats:
    place = jnp.arange(stats.drafted.shape[1] + 1)[None]
    was_drafted = place[:, :-1] < info.draft_lengths[:, None]
    # An emitted token that was not drafted replaces the draft token whose turn it was.
    num_tested = jnp.minimum(info.num_accepted + 1, info.num_emitted)[:, None]
    took_part = was_active.astype(jnp.int32)
    return Stats(
        rounds=stats.rounds + took_part,
        emitted=stats.emitted + info.num_emitted,
        drafted=stats.drafted + was_drafted.astype(jnp.int32),
        tested=stats.tested + ((place[:, :-1] < num_tested) & was_drafted).astype(jnp.int32),
        accepted=stats.accepted + (place[:, :-1] < info.num_accepted[:, None]).astype(jnp.int32),
        by_longest=stats.by_longest + jnp.where(place == jnp.max(info.draft_lengths), took_part[:, None], 0),
    )
