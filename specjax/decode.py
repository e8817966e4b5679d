"""The loops: one speculation round, the whole generation, and the autoregressive baseline.

Everything here is a pure function of its arguments. `generate` and `autoregressive` are one XLA program each; inside a
caller's own jit they become part of the caller's.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax import controllers, noise, tree, validate, verify
from specjax.noise import Role
from specjax.prefill import prefill
from specjax.rows import advance, is_active, last_tokens, open_rows
from specjax.sampling import process, sample
from specjax.types import (
    Array,
    Context,
    Controller,
    Draft,
    Drafter,
    DraftPlan,
    Generation,
    Model,
    PyTree,
    Round,
    Rows,
    Sampling,
    Stats,
    Status,
    Target,
    Verifier,
)
from specjax.validate import Request


class Roles(NamedTuple):
    """The static half of a generation: hashable, so that jit knows an old program by it."""

    model: Model
    drafter: Drafter
    verifier: Verifier
    controller: Controller


class State(NamedTuple):
    """The carry of the speculation loop.

    Invariant between rounds: the target's cache holds all tokens of a row but the last.
    """

    rows: Rows
    target_cache: PyTree
    drafter_state: PyTree
    controller_state: PyTree
    stats: Stats


def generate(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    prompts: Array,
    prompt_lengths: Array | None = None,
    *,
    key: Array | None = None,
    max_new_tokens: int | Array = 128,
    sampling: Sampling = Sampling(),
    verifier: Verifier | None = None,
    controller: Controller | None = None,
    controller_state: PyTree | None = None,
    stop_tokens: Array | tuple[int, ...] = (),
    seeds: Array | None = None,
    capacity: int | None = None,
    pad_token: int = 0,
) -> Generation:
    """Generates with speculation: the output follows the target's own law, in fewer target passes.

    A pure function: call it as it is, or inside your own jit, vmap or training loop. Parameters are arguments, never
    captured; a second call with the same shapes compiles nothing, whatever the values of the traced arguments.

    Args:
      model: the target.
      params: its parameters, any pytree.
      drafter: proposes tokens, for example `specjax.drafters.draft_model(draft)`.
      drafter_params: its parameters.
      prompts: [B, P] int32 ids, padded on the right (with any valid or invalid id).
      prompt_lengths: [B] int32 in 1..P; None means P for all.
      key: a PRNG key; None is `jax.random.key(0)`. Row b draws from `fold_in(key, seeds[b])`.
      max_new_tokens: an int, or [B] int32. Traced, it needs `capacity`.
      sampling: temperature, top-k, top-p, min-p: scalars or [B]. The default is greedy.
      verifier: default `verify.rejection()`, exact at every temperature.
      controller: how many tokens to draft; default `controllers.fixed(5)`.
      controller_state: from an earlier Generation, to go on from what was learnt.
      stop_tokens: ids that end a row, [n] or [B, n], pad -1. The stop token is emitted.
      seeds: [B] int32, default 0..B-1. A row's output depends on its seed, not on its place in the batch.
      capacity: the most tokens a row may hold, prompt included; default P + max(max_new_tokens). Keep it the same
        from call to call and different max_new_tokens share one program.
      pad_token: fills `Generation.tokens` past each row's length.

    Returns:
      A Generation. Rows with bad data end with a `Status` of their own; the others go on untouched.

    Raises:
      ValueError: an argument is wrong and that can be seen before running; the message says what to do.

    >>> import jax, jax.numpy as jnp, specjax
    >>> from specjax import testing
    >>> model = testing.table_model(order=1, vocab_size=8)
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> draft = specjax.drafters.draft_model(model)
    >>> prompts = jnp.array([[1, 2, 3], [4, 0, 0]])
    >>> out = specjax.generate(model, params, draft, params, prompts, jnp.array([3, 1]), max_new_tokens=6)
    >>> plain = specjax.autoregressive(model, params, prompts, jnp.array([3, 1]), max_new_tokens=6)
    >>> out.new_tokens() == plain.new_tokens()
    True

    Source: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318.
    """
    roles = Roles(model, drafter, verifier or verify.rejection(), controller or controllers.fixed(5))
    request = validate.request(
        model, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens, sampling=sampling,
        stop_tokens=stop_tokens, seeds=seeds, capacity=capacity,
    )  # fmt: skip
    validate.roles(roles.model, roles.drafter, roles.verifier, request.arrays.sampling)
    return _generate(roles, request.capacity, params, drafter_params, request.arrays, controller_state, pad_token)


def autoregressive(
    model: Model,
    params: PyTree,
    prompts: Array,
    prompt_lengths: Array | None = None,
    *,
    key: Array | None = None,
    max_new_tokens: int | Array = 128,
    sampling: Sampling = Sampling(),
    stop_tokens: Array | tuple[int, ...] = (),
    seeds: Array | None = None,
    capacity: int | None = None,
    pad_token: int = 0,
) -> Generation:
    """Generates one token per target pass: the baseline that speed-ups are quoted against.

    Arguments, result and errors as for `generate`, less what concerns the drafter.
    """
    request = validate.request(
        model, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens, sampling=sampling,
        stop_tokens=stop_tokens, seeds=seeds, capacity=capacity,
    )  # fmt: skip
    return _autoregressive(model, request.capacity, params, request.arrays, pad_token)


def start(
    roles: Roles,
    capacity: int,
    params: PyTree,
    drafter_params: PyTree,
    request: Request,
    controller_state: PyTree | None = None,
) -> State:
    """Reads the prompts with target and drafter, and emits each row's first token."""
    model, drafter, _, controller = roles
    batch, _ = request.prompts.shape
    longest = controller.longest
    slots = capacity + longest + 1  # a round writes K+1 slots past the live ones
    rows = _open(model, request, slots)
    cache = model.init_cache(params, batch, slots)
    prompts = rows.tokens[:, : request.prompts.shape[1]]
    prompt = prefill(model, params, prompts, rows.lengths, cache, drafter.hidden_layers)
    context = Context(rows, prompt.cache)
    drafter_state = drafter.init(drafter_params, context, prompts, prompt.hidden, slots=slots, longest=longest)
    counts = jnp.zeros((batch, longest), jnp.int32)
    none = jnp.zeros((batch,), jnp.int32)
    return State(
        rows=_first_token(model, rows, prompt.logits, capacity),
        target_cache=prompt.cache,
        drafter_state=drafter_state,
        controller_state=controller.init(batch) if controller_state is None else controller_state,
        stats=Stats(none, none, counts, counts, counts),
    )


def speculate(roles: Roles, capacity: int, params: PyTree, drafter_params: PyTree, state: State) -> tuple[State, Round]:
    """One round: draft, verify in one target pass, accept, commit. Rows that have ended stay as they are."""
    model, drafter, verifier, controller = roles
    rows = state.rows
    was_active = is_active(rows)
    context = Context(rows, state.target_cache)

    plan = _plan(controller, state.controller_state, rows)
    draft, drafter_state = drafter.propose(drafter_params, state.drafter_state, context, plan)
    longest = draft.tokens.shape[1]

    block_tokens = jnp.concatenate([last_tokens(rows, 1), draft.tokens], 1)
    shape = None if draft.parents is None else tree.layout(draft.parents)
    out = model.apply(
        params,
        block_tokens,
        state.target_cache,
        model.init_block(params, rows.tokens.shape[0], longest + 1),
        depths=shape and shape.depths,
        visible=shape and shape.visible,
        hidden_layers=drafter.hidden_layers,
    )
    processed = process(out.logits, rows.sampling, model.vocab_size)
    draft = _match_width(draft, processed.shape[-1])
    verdict = verifier.verify(context, draft, Target(processed, jax.nn.softmax(processed, -1)))

    path, drafted = verdict.path, draft.tokens
    sound = _is_sound(out.logits, model.vocab_size)  # [B, K+1]
    if path is not None:
        drafted = jnp.take_along_axis(drafted, path, 1)
        sound = jnp.take_along_axis(sound, jnp.pad(path + 1, ((0, 0), (1, 0))), 1)
    # Nothing after a law that is not finite can be trusted: tokens before it stay, the row ends there.
    num_sound = jnp.sum(jnp.cumprod(sound.astype(jnp.int32), -1), -1)
    num_accepted = jnp.minimum(verdict.num_accepted, num_sound)
    faulty = num_sound <= num_accepted
    width = drafted.shape[1]
    candidates = jnp.where(
        jnp.arange(width + 1)[None] == num_accepted[:, None],
        verdict.next_token[:, None],
        jnp.pad(drafted, ((0, 0), (0, 1))),
    )
    moved = advance(rows, candidates, num_accepted + jnp.where(faulty, 0, 1), faulty, capacity=capacity)

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
        hidden=out.hidden,
        path=path,
    )
    after = Context(moved.rows, target_cache)
    next_state = State(
        rows=moved.rows,
        target_cache=target_cache,
        drafter_state=drafter.commit(drafter_params, drafter_state, after, info),
        controller_state=controller.update(state.controller_state, info),
        stats=_count(state.stats, info, was_active),
    )
    return next_state, info


def finish(state: State, capacity: int, pad_token: int | Array) -> Generation:
    """The result, from the state of a loop that has ended (or was interrupted)."""
    return _result(state.rows, capacity, pad_token, state.stats, state.controller_state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(roles, capacity, params, drafter_params, request, controller_state, pad_token) -> Generation:
    state = start(roles, capacity, params, drafter_params, request, controller_state)

    def body(state: State) -> State:
        return speculate(roles, capacity, params, drafter_params, state)[0]

    state = lax.while_loop(lambda state: jnp.any(is_active(state.rows)), body, state)
    return finish(state, capacity, pad_token)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _autoregressive(model: Model, capacity, params, request: Request, pad_token) -> Generation:
    batch, width = request.prompts.shape
    rows = _open(model, request, capacity + 1)
    cache = model.init_cache(params, batch, capacity + 1)
    prompt = prefill(model, params, rows.tokens[:, :width], rows.lengths, cache)
    rows = _first_token(model, rows, prompt.logits, capacity)

    def step(carry: tuple[Rows, PyTree]) -> tuple[Rows, PyTree]:
        rows, cache = carry
        out = model.apply(params, last_tokens(rows, 1), cache, model.init_block(params, batch, 1))
        moved = _emit_one(model, rows, out.logits[:, 0], capacity)
        return moved.rows, model.commit(cache, out.block, moved.num_emitted, None)

    rows, _ = lax.while_loop(lambda carry: jnp.any(is_active(carry[0])), step, (rows, prompt.cache))
    nothing = jnp.zeros((batch, 0), jnp.int32)
    emitted = jnp.maximum(rows.lengths - rows.prompt_lengths - 1, 0)
    return _result(rows, capacity, pad_token, Stats(rows.rounds, emitted, nothing, nothing, nothing), ())


def _open(model: Model, request: Request, slots: int) -> Rows:
    prompts, lengths, key, limits, sampling, stop_tokens, seeds = request
    return open_rows(
        prompts, lengths, key=key, seeds=seeds, limits=lengths + limits, sampling=sampling,
        stop_tokens=stop_tokens, slots=slots, vocab_size=model.vocab_size,
    )  # fmt: skip


def _first_token(model: Model, rows: Rows, logits: Array, capacity: int) -> Rows:
    """The token after the prompt; it is part of no round."""
    moved = _emit_one(model, rows, logits, capacity)
    return moved.rows._replace(rounds=rows.rounds)


def _emit_one(model: Model, rows: Rows, logits: Array, capacity: int):
    """One token from the target's own law: noise is addressed by position, so any verifier can find it again."""
    processed = process(logits[:, None], rows.sampling, model.vocab_size)[:, 0]
    token = sample(noise.derive(rows.keys, Role.TARGET, rows.lengths), processed, rows.sampling)
    faulty = ~_is_sound(logits[:, None], model.vocab_size)[:, 0]
    return advance(rows, token[:, None], jnp.where(faulty, 0, 1), faulty, capacity=capacity)


def _plan(controller: Controller, state: PyTree, rows: Rows) -> DraftPlan:
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


def _is_sound(logits: Array, vocab_size: int) -> Array:
    """Whether the law after each token exists: no NaN, no +inf, something above -inf. [B, T, V] -> [B, T]."""
    # NaN propagates through max; -inf alone is a mask, not a fault.
    peak = jnp.max(logits[..., :vocab_size], -1)
    return jnp.isfinite(peak)


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


def _result(rows: Rows, capacity: int, pad_token, stats: Stats, controller_state: PyTree) -> Generation:
    # A bad prompt has generated nothing; its length is kept inside the buffer, whatever the caller passed.
    is_bad = rows.status == Status.BAD_PROMPT
    prompt_lengths = jnp.where(is_bad, rows.lengths, rows.prompt_lengths)
    is_text = jnp.arange(capacity)[None] < rows.lengths[:, None]
    tokens = jnp.where(is_text, rows.tokens[:, :capacity], pad_token)
    return Generation(tokens, rows.lengths, prompt_lengths, rows.status, stats, controller_state)


__all__ = ["Draft", "Roles", "State", "autoregressive", "finish", "generate", "speculate", "start"]
