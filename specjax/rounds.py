"""One speculation round: draft, verify, accept, commit; and the state that rounds pass on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax import log_probs, noise, tree
from specjax.context import make_context
from specjax.noise import Role
from specjax.prefill import prefill
from specjax.processors import without_padding
from specjax.rows import Advance, advance, is_active, last_tokens, open_rows
from specjax.sampling import processing, sample
from specjax.sharding import constrain
from specjax.types import (
    Array,
    Context,
    Controller,
    Draft,
    Drafter,
    DraftPlan,
    LogProbs,
    Model,
    Processor,
    PyTree,
    Round,
    Rows,
    Stats,
    Status,
    Target,
    Verifier,
)
from specjax.validate import Request
from specjax.verify.prefix import at_tokens


class Roles(NamedTuple):
    """The static half of a generation: hashable, so that jit knows an old program by it."""

    model: Model
    drafter: Drafter
    verifier: Verifier
    controller: Controller
    processor: Processor | None = None


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
        controller_state=controller.init(batch) if controller_state is None else controller_state,
        stats=Stats(none, none, counts, counts, counts),
    )


def speculate(roles: Roles, capacity: int, params: PyTree, drafter_params: PyTree, state: State) -> tuple[State, Round]:
    """One round: draft, verify in one target pass, accept, commit. Rows that have ended stay as they are."""
    model, drafter, verifier, controller, _ = roles
    rows = state.rows
    was_active = is_active(rows)
    context = context_of(roles, rows, state.target_cache)

    plan = plan_of(controller, state.controller_state, rows)
    draft, drafter_state = drafter.propose(drafter_params, state.drafter_state, context, plan)
    longest = draft.tokens.shape[1]

    block_tokens = jnp.concatenate([last_tokens(rows, 1), draft.tokens], 1)
    shape = tree.chain(longest) if draft.parents is None else tree.layout(draft.parents)
    is_tree = draft.parents is not None
    out = model.apply(
        params,
        block_tokens,
        state.target_cache,
        model.init_block(params, rows.tokens.shape[0], longest + 1),
        depths=shape.depths if is_tree else None,
        visible=shape.visible if is_tree else None,
        hidden_layers=drafter.hidden_layers,
    )
    processed = context.process(out.logits, draft.tokens, shape.visible[..., 1:], shape.depths[:, 1:] - 1)
    draft = _match_width(draft, processed.shape[-1])
    draft = draft._replace(probs=constrain(model.layout, draft.probs, "rows", None, "width"))
    verdict = verifier.verify(context, draft, Target(processed, jax.nn.softmax(processed, -1)))
    target_log_probs = _of_draft(draft, out.logits, processed, model.vocab_size)

    path, drafted, logits = verdict.path, draft.tokens, out.logits
    if path is not None:
        drafted = jnp.take_along_axis(drafted, path, 1)
        places = jnp.pad(path + 1, ((0, 0), (1, 0)))[..., None]
        logits, processed = (jnp.take_along_axis(x, places, 1) for x in (logits, processed))
    # Nothing after a law that does not exist can be trusted: tokens before it stay, the row ends there.
    fault = _fault(logits, processed, model.vocab_size)  # [B, W]
    num_sound = jnp.sum(jnp.cumprod((fault == Status.ACTIVE).astype(jnp.int32), -1), -1)
    num_accepted = jnp.minimum(verdict.num_accepted, num_sound)
    ends = num_sound <= num_accepted
    width = drafted.shape[1]
    candidates = jnp.where(
        jnp.arange(width + 1)[None] == num_accepted[:, None],
        verdict.next_token[:, None],
        jnp.pad(drafted, ((0, 0), (0, 1))),
    )
    scored = log_probs.of_tokens(logits, processed, candidates, model.vocab_size)
    moved = advance(
        rows,
        candidates,
        scored,
        num_accepted + jnp.where(ends, 0, 1),
        jnp.where(ends, jnp.take_along_axis(fault, num_accepted[:, None], 1)[:, 0], Status.ACTIVE),
        capacity=capacity,
    )

    block_path = None if path is None else jnp.pad(path + 1, ((0, 0), (1, 0)))
    target_cache = model.commit(state.target_cache, out.block, moved.num_emitted, block_path)
    place = jnp.arange(longest)[None]
    draft_lengths = jnp.where(was_active, draft.lengths, 0)
    info = Round(
        tokens=moved.tokens,
        num_emitted=moved.num_emitted,
        num_accepted=jnp.minimum(num_accepted, moved.num_emitted),
        draft_tokens=jnp.where(place < draft_lengths[:, None], draft.tokens, -1),
        draft_lengths=draft_lengths,
        draft_probs=jnp.ones(draft.tokens.shape) if draft.probs is None else at_tokens(draft.probs, draft.tokens),
        target_log_probs=target_log_probs,
        log_probs=scored,
        hidden=out.hidden,
        path=path,
    )
    after = context_of(roles, moved.rows, target_cache)
    next_state = State(
        rows=constrain(model.layout, moved.rows, "rows"),
        target_cache=target_cache,
        drafter_state=drafter.commit(drafter_params, drafter_state, after, info),
        controller_state=controller.update(state.controller_state, info),
        stats=_count(state.stats, info, was_active),
    )
    return next_state, info


def open_request(model: Model, request: Request, slots: int) -> Rows:
    """Fresh rows for a checked request, with room for `slots` tokens each."""
    prompts, lengths, key, limits, sampling, stop_tokens, seeds = request
    rows = open_rows(
        prompts, lengths, key=key, seeds=seeds, limits=lengths + limits, sampling=sampling,
        stop_tokens=stop_tokens, slots=slots, vocab_size=model.vocab_size,
    )  # fmt: skip
    return constrain(model.layout, rows, "rows")


def first_token(model: Model, processor: Processor | None, rows: Rows, logits: Array, capacity: int) -> Rows:
    """The token after the prompt; it is part of no round."""
    moved = emit_one(model, processor, rows, logits, capacity)
    return moved.rows._replace(rounds=rows.rounds)


def emit_one(model: Model, processor: Processor | None, rows: Rows, logits: Array, capacity: int) -> Advance:
    """One token from the target's own law: noise is addressed by position, so any verifier can find it again."""
    batch = rows.tokens.shape[0]
    logits = logits[:, None]
    nothing, unseen = jnp.zeros((batch, 0), jnp.int32), jnp.zeros((1, 1, 0), bool)
    processed = processing(rows, processor, model.vocab_size)(logits, nothing, unseen)
    token = sample(noise.derive(rows.keys, Role.TARGET, rows.lengths), processed[:, 0], rows.sampling)[:, None]
    fault = _fault(logits, processed, model.vocab_size)[:, 0]
    scored = log_probs.of_tokens(logits, processed, token, model.vocab_size)
    return advance(rows, token, scored, jnp.where(fault == Status.ACTIVE, 1, 0), fault, capacity=capacity)


def context_of(roles: Roles, rows: Rows, target_cache: PyTree) -> Context:
    """What drafter and verifier see of these rows."""
    return make_context(
        rows,
        target_cache,
        vocab_size=roles.model.vocab_size,
        processor=roles.processor,
        coupled=roles.verifier.coupled,
    )


def plan_of(controller: Controller, state: PyTree, rows: Rows) -> DraftPlan:
    """Draft lengths for this round; a row never drafts past its limit, less the token that verification adds."""
    lengths = jnp.clip(controller.draft_len(state), 0, controller.longest)
    lengths = jnp.clip(rows.limits - rows.lengths - 1, 0, lengths)
    steps = jnp.max(jnp.where(is_active(rows), lengths, 0)) if controller.varies else controller.longest
    rule = controller.keep_drafting
    keep = None if rule is None else lambda token, law, step: rule(state, token, law, step)
    return DraftPlan(lengths, controller.longest, steps, keep)


def _match_width(draft: Draft, width: int) -> Draft:
    """The draft's law over the target's columns: vocabularies are equal, but paddings may differ."""
    if draft.probs is None or draft.probs.shape[-1] == width:
        return draft
    probs = draft.probs[..., :width]
    return draft._replace(probs=jnp.pad(probs, ((0, 0), (0, 0), (0, width - probs.shape[-1]))))


def _of_draft(draft: Draft, logits: Array, processed: Array, vocab_size: int) -> LogProbs:
    """The target's log-probabilities [B, K] of the draft tokens, each at its parent's place."""
    if draft.parents is not None:
        parents = jnp.broadcast_to(jnp.atleast_2d(draft.parents), draft.tokens.shape)
        logits, processed = (jnp.take_along_axis(x, parents[..., None] + 1, 1) for x in (logits, processed))
        return log_probs.of_tokens(logits, processed, draft.tokens, vocab_size)
    # The last place holds no draft token; with it, these are the sums over the vocabulary that the emitted tokens need.
    scored = log_probs.of_tokens(logits, processed, jnp.pad(draft.tokens, ((0, 0), (0, 1))), vocab_size)
    return LogProbs(*(values[:, :-1] for values in scored))


def _fault(logits: Array, processed: Array, vocab_size: int) -> Array:
    """Why there is no law at a place: [B, W] int32 `Status`, ACTIVE where there is one."""
    # NaN propagates through max; -inf alone is a mask, not a fault.
    is_finite = jnp.isfinite(jnp.max(without_padding(logits, vocab_size), -1))
    has_choice = jnp.isfinite(jnp.max(processed, -1))
    return jnp.where(is_finite, jnp.where(has_choice, Status.ACTIVE, Status.DEAD_END), Status.NON_FINITE)


def _count(stats: Stats, info: Round, was_active: Array) -> Stats:
    place = jnp.arange(stats.drafted.shape[1])[None]
    was_drafted = place < info.draft_lengths[:, None]
    # An emitted token that was not drafted replaces the draft token whose turn it was.
    num_tested = jnp.minimum(info.num_accepted + 1, info.num_emitted)[:, None]
    return Stats(
        rounds=stats.rounds + was_active.astype(jnp.int32),
        emitted=stats.emitted + info.num_emitted,
        drafted=stats.drafted + was_drafted.astype(jnp.int32),
        tested=stats.tested + ((place < num_tested) & was_drafted).astype(jnp.int32),
        accepted=stats.accepted + (place < info.num_accepted[:, None]).astype(jnp.int32),
    )
