"""What speculation rounds are made of, and the state that they pass on; `loop` runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from specjax.decode import parts
from specjax.decode.arguments import Request
from specjax.decode.context import context_of
from specjax.decode.plain import first_token
from specjax.decode.prefill import prefill
from specjax.decode.round import Settled, settle, widened
from specjax.decode.run_if import at_most_once
from specjax.rows import Decision, append, is_active, open_rows
from specjax.sharding import constrain
from specjax.types import Array, Controller, Draft, DraftPlan, Model, PyTree, Roles, Round, Rows, Stats


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
        stats=Stats(none, none, counts, counts, counts, jnp.zeros((batch, longest + 1), jnp.int32), none, none),
    )


def _begin(controller: Controller, batch: int, learnt: PyTree | None) -> PyTree:
    if learnt is None:
        return controller.init(batch)
    return learnt if controller.begin is None else controller.begin(learnt)


def _drafted(rows: Rows, draft: Draft) -> Array:
    """[B]: lengths of drafts that count."""
    return jnp.where(is_active(rows), draft.lengths, 0)


def moved(roles: Roles, rows: Rows, settled: Settled) -> Rows:
    """The rows after the round."""
    info = settled.info
    decision = Decision(info.num_emitted, settled.status)
    return constrain(roles.model.layout, append(rows, jnp.maximum(info.tokens, 0), info.log_probs, decision), "rows")


def at_the_narrowest(
    roles: Roles, capacity: int, params: PyTree, rows: Rows, found: Settled, draft: Draft
) -> tuple[Settled, Array | bool]:
    """Settles the draft at the first of the controller's buckets that holds it, and says so; nothing else runs. One
    without a token is left to a plain step, where there are any: then `found` comes back, which has the target's cache
    as it is, and a round in which nothing happened.

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

    plain_steps = min(roles.controller.buckets) == 0
    if len(widths) == 1 and not plain_steps:
        return settle(roles, capacity, widest, params, rows, found.cache, draft), True
    needed = jnp.max(_drafted(rows, draft))
    chosen = jnp.searchsorted(jnp.asarray(widths, jnp.int32), needed, method="compare_all")
    for index, width in enumerate(widths):
        # Only what changes is carried: XLA copies a carried buffer that is read before the loop and after it.
        is_next = (chosen == index) & (needed > 0) if plain_steps else chosen == index
        found = at_most_once(is_next, at(width), found, rows, draft)
    return found, needed > 0 if plain_steps else True


def open_request(model: Model, request: Request, slots: int) -> Rows:
    """Fresh rows for a checked request, with room for `slots` tokens each."""
    rows = open_rows(
        request.prompts, request.prompt_lengths, key=request.key, seeds=request.seeds,
        limits=request.prompt_lengths + request.limits, draft_limits=request.draft_limits, sampling=request.sampling,
        stop_tokens=request.stop_tokens, slots=slots, vocab_size=model.vocab_size,
    )  # fmt: skip
    return constrain(model.layout, rows, "rows")


def draft_lengths(controller: Controller, state: PyTree, rows: Rows) -> Array:
    """[B] for the next round; a row never drafts past its limits, less the token that verification adds."""
    most = jnp.minimum(rows.limits - rows.lengths - 1, rows.draft_limits)
    wanted = controller.draft_len(state, rows)
    parts.draft_lengths(wanted, rows.lengths.shape[0])
    lengths = jnp.clip(jnp.minimum(wanted, most), 0, controller.longest)
    return jnp.where(is_active(rows), lengths, 0)


def plan_of(controller: Controller, state: PyTree, lengths: Array) -> DraftPlan:
    """What drafters are told of a round with drafts of so many tokens."""
    buckets = controller.buckets
    steps = jnp.maximum(jnp.max(lengths), min(buckets)) if len(buckets) > 1 else controller.longest
    rule = controller.keep_drafting
    keep_drafting = None if rule is None else lambda drawn, step: rule(state, drawn, step)
    return DraftPlan(lengths, controller.longest, steps, min(buckets) == 0, keep_drafting)


def count(stats: Stats, info: Round, was_active: Array) -> Stats:
    """The counts after the round."""
    place = jnp.arange(stats.drafted.shape[1] + 1)[None]
    longest = jnp.max(info.draft_lengths)
    waited = jnp.where(was_active & (longest > 0), stats.by_longest[:, 0] - stats.caught_up, 0)
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
        by_longest=stats.by_longest + jnp.where(place == longest, took_part[:, None], 0),
        resumed=stats.resumed + (waited > 0).astype(jnp.int32),
        caught_up=stats.caught_up + waited,
    )
