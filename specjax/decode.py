"""The loops: generation with speculation, and the autoregressive baseline.

Everything here is a pure function of its arguments. `generate` and `autoregressive` are one XLA program each; inside a
caller's own jit they become part of the caller's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from specjax import controllers, integers, logs, parts, validate, verify
from specjax.calls import names_sampling, without_gradient
from specjax.loop import MOST_ROUNDS, run
from specjax.plain import first_token, step
from specjax.prefill import prefill
from specjax.rounds import State, open_request, start
from specjax.rows import is_active
from specjax.sharding import Layout, constrain, globally
from specjax.types import (
    Array,
    Controller,
    Drafter,
    Generation,
    LogProbs,
    Model,
    Processor,
    PyTree,
    Roles,
    Rows,
    Sampling,
    Stats,
    Status,
    Verifier,
)
from specjax.validate import Request


@names_sampling
def generate(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike | None = None,
    *,
    key: Array | None = None,
    max_new_tokens: ArrayLike = 128,
    sampling: Sampling = Sampling(),
    processor: Processor | None = None,
    verifier: Verifier | None = None,
    controller: Controller | None = None,
    controller_state: PyTree | None = None,
    max_draft_len: ArrayLike | None = None,
    stop_tokens: ArrayLike | Sequence[int] = (),
    seeds: ArrayLike | None = None,
    capacity: int | None = None,
    pad_token: int = 0,
    rounds_per_test: int = 1,
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
      key: a PRNG key of any implementation; None is `jax.random.key(0, impl="threefry2x32")`. Row b draws by a Threefry
        key of its own, made from the bits of `key` and seeds[b].
      max_new_tokens: an int, or [B] int32. Traced, it needs `capacity`.
      sampling: temperature, top-k, top-p, min-p, penalties, bias, bad words, minimum length: scalars or [B]. The
        default is greedy.
      processor: your own rule, a grammar or a mask; see `specjax.Processor`. Draft and target both obey it.
      verifier: default `verify.rejection()`, exact at every temperature.
      controller: how many tokens to draft; default `controllers.fixed(5)`.
      controller_state: from an earlier Generation, to go on from what was learnt.
      max_draft_len: int32 scalar or [B]: the most tokens to draft for a row in a round, whatever the controller says; 0
        switches speculation off for the row. None is no limit.
      stop_tokens: ids that end a row, [n] or [B, n], pad -1. The stop token is emitted.
      seeds: [B] int32, default 0..B-1. A row's output depends on its seed, not on its place in the batch.
      capacity: the most tokens a row may hold, prompt included; default P + max(max_new_tokens), at most the
        model's positions. Keep it the same from call to call and different max_new_tokens share one program.
      pad_token: fills `Generation.tokens` past each row's length.
      rounds_per_test: rounds between two tests whether all rows have ended, 65536 at most. On a mesh each test is an
        all-reduce; at the end up to as many rounds, less one, do nothing.

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
    parts.kinds(model, drafter, verifier, controller)
    parts.processor(processor)
    filler = validate.pad_token(pad_token)
    roles = Roles(model, drafter, verifier or verify.rejection(), controller or controllers.fixed(5), processor)
    request = validate.request(
        model, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens, sampling=sampling,
        max_draft_len=max_draft_len, stop_tokens=stop_tokens, seeds=seeds, capacity=capacity,
    )  # fmt: skip
    parts.fit(roles.model, roles.drafter, roles.verifier, request.arrays.sampling)
    rounds_per_test = integers.static(rounds_per_test, "rounds_per_test", most=MOST_ROUNDS)
    parts.controller_state(roles.controller, controller_state, request)
    arrays = globally(model.layout, request.arrays)
    program = functools.partial(_generate, roles, request.capacity, rounds_per_test)
    return without_gradient(program, params, drafter_params, arrays, controller_state, filler)


@names_sampling
def autoregressive(
    model: Model,
    params: PyTree,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike | None = None,
    *,
    key: Array | None = None,
    max_new_tokens: ArrayLike = 128,
    sampling: Sampling = Sampling(),
    processor: Processor | None = None,
    stop_tokens: ArrayLike | Sequence[int] = (),
    seeds: ArrayLike | None = None,
    capacity: int | None = None,
    pad_token: int = 0,
    rounds_per_test: int = 1,
) -> Generation:
    """Generates one token per target pass: the baseline that speed-ups are quoted against.

    Arguments, result and errors as for `generate`, less what concerns the drafter.
    """
    parts.kinds(model)
    parts.processor(processor)
    filler = validate.pad_token(pad_token)
    request = validate.request(
        model, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens, sampling=sampling,
        stop_tokens=stop_tokens, seeds=seeds, capacity=capacity,
    )  # fmt: skip
    rounds_per_test = integers.static(rounds_per_test, "rounds_per_test", most=MOST_ROUNDS)
    arrays = globally(model.layout, request.arrays)
    program = functools.partial(_autoregressive, model, processor, request.capacity, rounds_per_test)
    return without_gradient(program, params, arrays, filler)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    roles: Roles, capacity, rounds_per_test, params, drafter_params, request, controller_state, pad_token
) -> Generation:
    batch, width = request.prompts.shape
    longest = roles.controller.longest
    logs.tracing("generate", rows=batch, prompt_width=width, capacity=capacity, draft_len=longest)
    state = start(roles, capacity, params, drafter_params, request, controller_state)

    state = _rounds(roles, capacity, params, drafter_params, state, rounds_per_test)
    return _result(state.rows, capacity, pad_token, state.stats, state.controller_state, roles.model.layout)


def _rounds(roles: Roles, capacity: int, params, drafter_params, state: State, rounds_per_test: int) -> State:
    given = (roles, capacity, params, drafter_params)
    if rounds_per_test == 1:
        return run(*given, state, (), lambda kept, took_part, info: kept, lambda rows, kept: _has_active(rows))[0]

    def several(state: State) -> State:
        done, note = jnp.int32(0), lambda done, took_part, info: done + 1
        return run(*given, state, done, note, lambda rows, done: done < rounds_per_test)[0]

    return lax.while_loop(lambda state: _has_active(state.rows), several, state)


def _has_active(rows: Rows) -> Array:
    return jnp.any(is_active(rows))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _autoregressive(
    model: Model, processor, capacity, rounds_per_test, params, request: Request, pad_token
) -> Generation:
    batch, width = request.prompts.shape
    logs.tracing("autoregressive", rows=batch, prompt_width=width, capacity=capacity)
    rows = open_request(model, request, capacity + 1)
    cache = model.init_cache(params, batch, capacity + 1)
    prompt = prefill(model, params, rows.tokens[:, :width], rows.lengths, cache)
    rows = first_token(model, processor, rows, prompt.logits, capacity)

    carry = (rows, prompt.cache)
    rows, _ = plain_loop(model, processor, capacity, params, carry, rounds_per_test)
    nothing, none = jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch,), jnp.int32)
    emitted = jnp.maximum(rows.lengths - rows.prompt_lengths - 1, 0)
    stats = Stats(rows.rounds, emitted, nothing, nothing, nothing, rows.rounds[:, None], none, none)
    return _result(rows, capacity, pad_token, stats, (), model.layout)


def plain_loop(
    model: Model,
    processor: Processor | None,
    capacity: int,
    params: PyTree,
    carry: tuple[Rows, PyTree],
    rounds_per_test: int = 1,
) -> tuple[Rows, PyTree]:
    """One token per target pass, from rows and the cache that holds all their tokens but the last, until all end."""

    def one(carry: tuple[Rows, PyTree]) -> tuple[Rows, PyTree]:
        rows, cache = step(model, processor, capacity, params, *carry)
        return constrain(model.layout, rows, "rows"), cache

    def several(carry: tuple[Rows, PyTree]) -> tuple[Rows, PyTree]:
        if rounds_per_test == 1:
            return one(carry)
        return lax.fori_loop(0, rounds_per_test, lambda _, carry: one(carry), carry)

    return lax.while_loop(lambda carry: _has_active(carry[0]), several, carry)


def _result(
    rows: Rows, capacity: int, pad_token, stats: Stats, controller_state: PyTree, layout: Layout | None
) -> Generation:
    # A bad prompt has generated nothing; its length is kept inside the buffer, whatever the caller passed.
    is_bad = rows.status == Status.BAD_PROMPT
    prompt_lengths = jnp.where(is_bad, rows.lengths, rows.prompt_lengths)
    is_text = jnp.arange(capacity)[None] < rows.lengths[:, None]
    tokens = jnp.where(is_text, rows.tokens[:, :capacity], pad_token)
    is_new = is_text & (jnp.arange(capacity)[None] >= prompt_lengths[:, None])
    scored = LogProbs(*(jnp.where(is_new, x[:, :capacity], 0.0) for x in rows.log_probs))
    out = Generation(tokens, rows.lengths, prompt_lengths, rows.status, scored, stats, controller_state)
    return constrain(layout, out)  # whole on every device, so that each process of a pod can read it
