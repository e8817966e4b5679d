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

from specjax import integers, logs
from specjax.decode import arguments, plain
from specjax.decode.arguments import Request
from specjax.decode.call import prepare
from specjax.decode.calls import names_sampling, without_gradient
from specjax.decode.loop import MOST_ROUNDS, run
from specjax.decode.start import start
from specjax.decode.state import Carry, Learnt
from specjax.rows import is_active
from specjax.sharding import constrain
from specjax.types import (
    Array,
    Controller,
    Drafter,
    Generation,
    LogProbs,
    Model,
    Params,
    Processor,
    PyTree,
    Rows,
    Sampling,
    Setup,
    Status,
    Verifier,
)


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
    drafter_state: PyTree | None = None,
    max_draft_len: ArrayLike | None = None,
    stop_tokens: ArrayLike | Sequence[int] = (),
    seeds: ArrayLike | None = None,
    inputs: PyTree | None = None,
    capacity: int | None = None,
    pad_token: int = 0,
    rounds_per_test: int = 1,
) -> Generation:
    """Generates with speculation: the output follows the target's own distribution, in fewer target passes.

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
        key of its own, derived from the bits of `key` and seeds[b].
      max_new_tokens: an int, or [B] int32. Traced, it needs `capacity`.
      sampling: temperature, top-k, top-p, min-p, penalties, bias, bad words, minimum length: scalars or [B]. The
        default is greedy.
      processor: your own rule, a grammar or a mask; see `specjax.Processor`. Draft and target both obey it.
      verifier: default `verify.rejection()`, exact at every temperature.
      controller: how many tokens to draft; default `controllers.fixed(5)`.
      controller_state: from an earlier Generation, to continue from what the controller learnt.
      drafter_state: the same for a drafter that learns.
      max_draft_len: int32 scalar or [B]: the most tokens to draft for a row in a round, whatever the controller says; 0
        switches speculation off for the row. None is no limit.
      stop_tokens: ids that end a row, [n] or [B, n], pad -1. The stop token is emitted.
      seeds: [B] int32, default 0..B-1. A row's output depends on its seed, not on its place in the batch.
      inputs: what the encoder of an encoder-decoder reads: a pytree of arrays [B, ...], as its Model says.
      capacity: the most tokens a row may hold, prompt included; default P + max(max_new_tokens), at most the
        model's positions. Keep it the same from call to call and different max_new_tokens share one program.
      pad_token: fills `Generation.tokens` past each row's length.
      rounds_per_test: rounds between two tests whether all rows have ended, 65536 at most. On a mesh each test is an
        all-reduce. At the end up to rounds_per_test - 1 rounds do nothing.

    Returns:
      A Generation. Rows with bad data end with a `Status` that says so; the other rows are not affected.

    Raises:
      ValueError: an argument is wrong, as far as this can be checked before running; the message says what to do.

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
    filler = arguments.pad_token(pad_token)
    rounds_per_test = integers.static(rounds_per_test, "rounds_per_test", most=MOST_ROUNDS)
    call = prepare(
        model, params, drafter, drafter_params, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens,
        sampling=sampling, processor=processor, verifier=verifier, controller=controller,
        controller_state=controller_state, drafter_state=drafter_state, max_draft_len=max_draft_len,
        stop_tokens=stop_tokens, seeds=seeds, inputs=inputs, capacity=capacity,
    )  # fmt: skip
    program = functools.partial(_generate, call.setup, rounds_per_test)
    return without_gradient(program, call.params, call.request, call.learnt, filler)


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
    inputs: PyTree | None = None,
    capacity: int | None = None,
    pad_token: int = 0,
    rounds_per_test: int = 1,
) -> Generation:
    """Generates one token per target pass: the baseline of all speed-ups.

    Arguments, result and errors as for `generate`, without those of the drafter.
    """
    filler = arguments.pad_token(pad_token)
    rounds_per_test = integers.static(rounds_per_test, "rounds_per_test", most=MOST_ROUNDS)
    call = prepare(
        model, params, plain.DRAFTER, None, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens,
        sampling=sampling, processor=processor, controller=plain.CONTROLLER, stop_tokens=stop_tokens, seeds=seeds,
        inputs=inputs, capacity=capacity,
    )  # fmt: skip
    program = functools.partial(_generate, call.setup, rounds_per_test)
    return without_gradient(program, call.params, call.request, call.learnt, filler)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    setup: Setup, rounds_per_test: int, params: Params, request: Request, learnt: Learnt, pad_token: Array
) -> Generation:
    batch, width = request.prompts.shape
    program = "generate" if setup.longest else "autoregressive"
    logs.tracing(program, rows=batch, prompt_width=width, capacity=setup.capacity, draft_len=setup.longest)
    carry = _until_done(setup, params, start(setup, params, request, learnt), rounds_per_test)
    return result(setup, carry, pad_token)


def _until_done(setup: Setup, params: Params, carry: Carry, rounds_per_test: int) -> Carry:
    def has_active(rows: Rows) -> Array:
        return jnp.any(is_active(rows))

    if rounds_per_test == 1:
        keep_none, until_done = lambda record, took_part, info: record, lambda rows, record: has_active(rows)
        return run(setup, params, carry, (), keep_none, until_done)[0]

    def several(carry: Carry) -> Carry:
        count, so_many = lambda done, took_part, info: done + 1, lambda rows, done: done < rounds_per_test
        return run(setup, params, carry, jnp.int32(0), count, so_many)[0]

    return lax.while_loop(lambda carry: has_active(carry.rows), several, carry)


def result(setup: Setup, carry: Carry, pad_token: Array | int) -> Generation:
    """The rows' texts so far, as a Generation."""
    rows, capacity = carry.rows, setup.capacity
    # A bad prompt has generated nothing; its length is kept inside the buffer, whatever the caller passed.
    is_bad = rows.status == Status.BAD_PROMPT
    prompt_lengths = jnp.where(is_bad, rows.lengths, rows.prompt_lengths)
    is_text = jnp.arange(capacity)[None] < rows.lengths[:, None]
    tokens = jnp.where(is_text, rows.tokens[:, :capacity], pad_token)
    is_new = is_text & (jnp.arange(capacity)[None] >= prompt_lengths[:, None])
    scored = LogProbs(*(jnp.where(is_new, x[:, :capacity], 0.0) for x in rows.log_probs))
    learns = setup.drafter.learnt
    out = Generation(
        tokens, rows.lengths, prompt_lengths, rows.status, scored, carry.stats, carry.controller_state,
        () if learns is None else learns(carry.drafter_state, rows),
    )  # fmt: skip
    return constrain(setup.model.layout, out)  # whole on every device, so that each process of a pod can read it
