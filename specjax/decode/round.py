"""One round, top to bottom: plan, draft, score, verify, emit, commit; and the first token, which the prompt gives.

The block of a round holds the root (the row's last token) and the draft after it. Letters in shapes: B rows, V columns
of the logits, K the longest draft (the depth, for a tree), N draft tokens (K of a chain, all nodes of a tree), W the
draft places that a compiled width handles: N, a smaller number that holds the draft, or 0 in a plain round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax import noise, tree
from specjax.decode import log_probs, parts
from specjax.decode.advance import Played, advance, append_emitted
from specjax.decode.context import context_of
from specjax.decode.run_if import zeros_like
from specjax.decode.state import Carry
from specjax.decode.widths import RoundResult, at_narrowest_width, empty_round
from specjax.noise import Role
from specjax.processors import without_padding
from specjax.rows import decide, is_active, last_tokens
from specjax.sampling import sample
from specjax.sharding import constrain
from specjax.types import (
    Array,
    Context,
    Draft,
    DraftPlan,
    LogProbs,
    Params,
    PyTree,
    Round,
    Rows,
    Setup,
    Status,
    Target,
    Verdict,
)
from specjax.verify.prefix import at_tokens, by_token, num_leading

# How a round makes its draft: (setup, params, carry, plan) -> (Draft, the drafter's state).
Propose = Callable[[Setup, Params, Carry, DraftPlan], tuple[Draft, PyTree]]


def play_round(setup: Setup, params: Params, carry: Carry, propose: Propose) -> Played:
    """One round of all rows that are active; rows that have ended stay as they are.

    `propose` is `draft` in a round that drafts and `draft_nothing` in a plain round; all else is the same.
    """
    # plan: how many tokens each row drafts, [B] in 0..K
    plan = plan_round(setup, carry)

    # draft: tokens [B, N], and the distributions that they were drawn from, [B, N, V]; N is 0 in a plain round
    drafted, drafter_state = propose(setup, params, carry, plan)

    def score_to_commit(initial: RoundResult, rows: Rows, draft: Draft) -> RoundResult:
        context = context_of(setup, params, rows, initial.cache)

        # score: one target pass over root and draft, logits [B, W+1, V]
        scores = score(setup, params, context, draft)

        # verify: the first num_accepted [B] draft tokens stay, and next_token [B] follows them
        verdict = verify(setup, context, draft, scores)

        # emit: new tokens of each row ([B, W+1]; [B, K+1] along a path) and its status [B], after faults, stops, limits
        emitted = emit(setup, rows, draft, scores, verdict)

        # commit: the target's cache keeps the root and all emitted tokens but the last, which is the next root
        return commit(setup, initial.cache, scores, emitted)

    # These four are compiled at a few widths W, and the narrowest that holds the draft runs. If all drafts are empty
    # and the controller has plain rounds, none runs: `happened` is False, and a plain round comes next.
    initial = _initial_result(setup, params, carry)
    result, happened = at_narrowest_width(setup, score_to_commit, initial, carry.rows, drafted)

    # Rows, drafter, controller and statistics move on by what was emitted.
    return advance(setup, params, carry, drafter_state, result, happened)


def _initial_result(setup: Setup, params: Params, carry: Carry) -> RoundResult:
    """The result before the target runs: cache and status unchanged, and an empty round."""
    rows, batch, layers = carry.rows, carry.rows.lengths.shape[0], setup.drafter.hidden_layers

    def hidden(context: Context) -> tuple[Array, ...]:
        tokens = jnp.zeros((batch, setup.longest + 1), jnp.int32)
        block = setup.model.init_block(params.target, batch, setup.longest + 1)
        return setup.model.apply(params.target, tokens, context.target_cache, block, hidden_layers=layers).hidden

    context = context_of(setup, params, rows, carry.target_cache)
    no_states = zeros_like(hidden, context) if layers else ()  # `hidden` never runs: its shapes are what is needed
    return RoundResult(carry.target_cache, rows.status, empty_round(setup, batch), no_states)


def plan_round(setup: Setup, carry: Carry) -> DraftPlan:
    """How far each row may draft in this round, by the controller."""
    controller, state = setup.controller, carry.controller_state
    buckets, rule = controller.buckets, controller.keep_drafting  # buckets: the widths that are compiled
    steps = jnp.maximum(jnp.max(carry.draft_lengths), min(buckets)) if len(buckets) > 1 else setup.longest
    keep_drafting = None if rule is None else lambda drawn, step: rule(state, drawn, step)
    return DraftPlan(
        carry.draft_lengths, setup.longest, steps, may_skip=setup.has_plain_rounds, keep_drafting=keep_drafting
    )


def draft(setup: Setup, params: Params, carry: Carry, plan: DraftPlan) -> tuple[Draft, PyTree]:
    """The drafter's draft, within the plan."""
    context = context_of(setup, params, carry.rows, carry.target_cache)
    made, state = setup.drafter.propose(params.drafter, carry.drafter_state, context, plan)
    parts.check_draft(setup, made)
    if made.parents is None:
        lengths = jnp.minimum(made.lengths, plan.lengths)
    else:  # a tree is verified whole: its nodes are in no order that could be cut
        lengths = jnp.where(plan.lengths > 0, made.lengths, 0)
    return made._replace(lengths=lengths), state


def draft_nothing(setup: Setup, params: Params, carry: Carry, plan: DraftPlan) -> tuple[Draft, PyTree]:
    """The empty draft of a plain round; the drafter is not called."""
    del setup, params, plan
    return _empty_draft(carry.rows), carry.drafter_state


def _empty_draft(rows: Rows) -> Draft:
    return Draft(rows.tokens[:, :0], jnp.zeros_like(rows.lengths), None)


class Scores(NamedTuple):
    """The target's scores at the root and at each draft token."""

    logits: Array  # [B, W+1, V] float32, the model's own
    processed: Array  # [B, W+1, V] float32, after penalties, temperature and filters; -inf: probability zero
    fault: Array  # [B, W+1] int32 `Status`: why a place has no distribution; ACTIVE where it has one
    depths: Array  # [B or 1, W+1] int32, distance from the root
    hidden: tuple[Array, ...] = ()  # [B, W+1, D] per layer the drafter asked for
    block: PyTree = ()


def score(setup: Setup, params: Params, context: Context, draft: Draft) -> Scores:
    """The target's pass over the block."""
    model, batch, width = setup.model, *draft.tokens.shape
    layout, places = tree.chain(width), {}
    if draft.parents is not None:
        layout = tree.layout(draft.parents)
        places = {"depths": layout.depths, "visible": layout.visible}
    tokens = jnp.concatenate([last_tokens(context.rows, 1), draft.tokens], 1)
    block = model.init_block(params.target, batch, width + 1)
    hidden_layers = setup.drafter.hidden_layers
    out = model.apply(params.target, tokens, context.target_cache, block, **places, hidden_layers=hidden_layers)
    return _scores(setup, context, draft, layout, out.logits)._replace(hidden=out.hidden, block=out.block)


def _scores(setup: Setup, context: Context, draft: Draft, layout: tree.Layout, logits: Array) -> Scores:
    # `process` counts draft tokens, without the root: the visible ones, and how many stand before each.
    processed = context.process(logits, draft.tokens, layout.visible[..., 1:], layout.depths[:, 1:] - 1)
    # NaN propagates through max; -inf alone is a mask, not a fault.
    is_finite = jnp.isfinite(jnp.max(without_padding(logits, setup.model.vocab_size), -1))
    has_choice = jnp.isfinite(jnp.max(processed, -1))
    fault = jnp.where(is_finite, jnp.where(has_choice, Status.ACTIVE, Status.DEAD_END), Status.NON_FINITE)
    return Scores(logits, processed, fault, layout.depths)


def verify(setup: Setup, context: Context, draft: Draft, scores: Scores) -> Verdict:
    """Runs the verifier; rows without a draft get the token of plain decoding."""
    rows = context.rows
    if draft.tokens.shape[1] == 0:
        return Verdict(jnp.zeros_like(draft.lengths), _plain_token(rows, scores))
    draft = _match_columns(setup, draft, scores.processed.shape[-1])
    # A chain is cut before its first place without a distribution, because verifiers may compute with all places at
    # once. `emit` ends the row at that place, whatever is drawn there. A tree keeps its other branches.
    is_sound = scores.fault == Status.ACTIVE
    logits = jnp.where(is_sound[..., None], scores.processed, 0.0)
    sound = draft
    if draft.parents is None:
        sound = draft._replace(lengths=jnp.minimum(draft.lengths, num_leading(is_sound)))
    verdict = setup.verifier.verify(context, sound, Target(logits, jax.nn.softmax(logits, -1)))
    parts.check_verdict(setup, verdict)
    # Plain rounds run no verifier, so a row without a draft draws with the noise of plain decoding here too: its token
    # must not depend on whether other rows draft.
    has_none = draft.lengths == 0
    next_token = lax.cond(
        jnp.any(has_none),
        lambda: jnp.where(has_none, _plain_token(rows, scores), verdict.next_token),
        lambda: verdict.next_token,
    )
    return verdict._replace(next_token=next_token)


def _plain_token(rows: Rows, scores: Scores) -> Array:
    """The token after the root, [B] int32. Its noise depends on the row's key and position alone, so the coupled
    verifier can draw the same token."""
    return sample(noise.derive(rows.keys, Role.TARGET, rows.lengths), scores.processed[:, 0], rows.sampling)


def _match_columns(setup: Setup, draft: Draft, width: int) -> Draft:
    """The draft's probabilities over the target's columns: vocabularies are equal, but paddings may differ."""
    if draft.probs is None:
        return draft
    probs = draft.probs[..., :width]
    probs = jnp.pad(probs, ((0, 0), (0, 0), (0, width - probs.shape[-1])))
    return draft._replace(probs=constrain(setup.model.layout, probs, "rows", None, "width"))


class Emitted(NamedTuple):
    """The round with its emitted tokens, and the rows' status after it."""

    round: Round
    status: Array  # [B] int32, a `Status`


def emit(setup: Setup, rows: Rows, draft: Draft, scores: Scores, verdict: Verdict) -> Emitted:
    """Decides how many of the accepted tokens and `next_token` each row emits, and the row's status after that."""
    path, drafted, logits, processed, fault = verdict.path, draft.tokens, scores.logits, scores.processed, scores.fault
    if path is not None:
        drafted, places = jnp.take_along_axis(drafted, path, 1), block_places(path)
        logits, processed = (jnp.take_along_axis(x, places[..., None], 1) for x in (logits, processed))
        fault = jnp.take_along_axis(fault, places, 1)
    # Tokens after a place without a distribution are not valid: tokens before it stay, and the row ends there.
    num_sound = num_leading(fault == Status.ACTIVE)
    num_accepted = jnp.minimum(verdict.num_accepted, num_sound)
    ends = num_sound == num_accepted
    candidates = jnp.where(
        jnp.arange(drafted.shape[1] + 1)[None] == num_accepted[:, None],
        verdict.next_token[:, None],
        jnp.pad(drafted, ((0, 0), (0, 1))),
    )
    decision = decide(
        rows,
        candidates,
        num_accepted + jnp.where(ends, 0, 1),
        jnp.where(ends, jnp.take_along_axis(fault, num_accepted[:, None], 1)[:, 0], Status.ACTIVE),
        capacity=setup.capacity,
    )
    num_emitted = decision.num_emitted
    is_drafted = jnp.arange(draft.tokens.shape[1])[None] < jnp.where(is_active(rows), draft.lengths, 0)[:, None]
    round_ = Round(
        tokens=jnp.where(jnp.arange(candidates.shape[1])[None] < num_emitted[:, None], candidates, -1),
        num_emitted=num_emitted,
        num_accepted=jnp.minimum(num_accepted, num_emitted),
        draft_tokens=jnp.where(is_drafted, draft.tokens, -1),
        draft_lengths=jnp.max(jnp.where(is_drafted, scores.depths[:, 1:], 0), -1, initial=0),
        # Without probabilities the draft was drawn from a one-hot distribution.
        draft_probs=jnp.ones(draft.tokens.shape) if draft.probs is None else at_tokens(by_token(draft), draft.tokens),
        target_log_probs=_draft_log_probs(draft, scores, setup.model.vocab_size),
        log_probs=log_probs.of_tokens(logits, processed, candidates, setup.model.vocab_size),
        at_leaf=_at_leaf(draft, is_drafted, num_accepted, path),
        source=None if draft.source is None else jnp.where(is_active(rows) & (draft.lengths > 0), draft.source, -1),
        path=path,
    )
    return Emitted(round_, decision.status)


def _at_leaf(draft: Draft, is_drafted: Array, num_accepted: Array, path: Array | None) -> Array:
    """[B]: whether no draft token follows the accepted ones."""
    if draft.parents is None or path is None:
        return num_accepted >= jnp.sum(is_drafted, -1)
    last = jnp.take_along_axis(block_places(path), num_accepted[:, None], 1) - 1  # -1: the root
    return ~jnp.any(is_drafted & (jnp.atleast_2d(draft.parents) == last), -1)


def _draft_log_probs(draft: Draft, scores: Scores, vocab_size: int) -> LogProbs:
    """The target's log-probabilities [B, W] of the draft tokens, each at its parent's place."""
    logits, processed = scores.logits, scores.processed
    if draft.parents is not None:
        parents = jnp.broadcast_to(jnp.atleast_2d(draft.parents), draft.tokens.shape)
        logits, processed = (jnp.take_along_axis(x, parents[..., None] + 1, 1) for x in (logits, processed))
        return log_probs.of_tokens(logits, processed, draft.tokens, vocab_size)
    # The last place holds no draft token. It is included because the emitted tokens need the same sums over the
    # vocabulary, at all places: XLA then computes them once.
    scored = log_probs.of_tokens(logits, processed, jnp.pad(draft.tokens, ((0, 0), (0, 1))), vocab_size)
    return LogProbs(*(values[:, :-1] for values in scored))


def block_places(path: Array) -> Array:
    """[B, K+1] int32: places in the block of the root and of a path [B, K] of draft indices."""
    return jnp.pad(path + 1, ((0, 0), (1, 0)))


def commit(setup: Setup, cache: PyTree, scores: Scores, emitted: Emitted) -> RoundResult:
    """Adds the root and the emitted tokens but the last to the target's cache: `num_emitted` places of the block."""
    path, hidden = emitted.round.path, scores.hidden
    places = None if path is None else block_places(path)
    if places is not None:
        hidden = tuple(jnp.take_along_axis(x, places[..., None], 1) for x in hidden)
    cache = setup.model.commit(cache, scores.block, emitted.round.num_emitted, places)
    return RoundResult(cache, emitted.status, emitted.round, hidden)


def first_token(setup: Setup, context: Context, logits: Array) -> Rows:
    """The rows with the token after the prompt, from its logits [B, V]; this token belongs to no round."""
    rows = context.rows
    nothing = _empty_draft(rows)
    scores = _scores(setup, context, nothing, tree.chain(0), logits[:, None])
    emitted = emit(setup, rows, nothing, scores, verify(setup, context, nothing, scores))
    return append_emitted(setup, rows, emitted.round, emitted.status)._replace(rounds=rows.rounds)
