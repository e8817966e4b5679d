"""A generation by hand: `init`, then `step` round by round, and `finish`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from specjax import logs
from specjax.decode import arguments
from specjax.decode.api import result
from specjax.decode.arguments import Request
from specjax.decode.call import prepare
from specjax.decode.calls import names_sampling
from specjax.decode.loop import one_round
from specjax.decode.start import start
from specjax.decode.state import Carry, Learnt, State
from specjax.traced import is_traced
from specjax.types import (
    Array,
    Controller,
    Drafter,
    Generation,
    Model,
    Params,
    Processor,
    PyTree,
    Round,
    Sampling,
    Setup,
    Verifier,
)


@names_sampling
def init(
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
) -> State:
    """Reads the prompts and emits each row's first token; `step` continues from there.

    Arguments and errors as for `generate`. The tokens are those of `generate` with the same arguments.

    >>> import jax, jax.numpy as jnp, specjax
    >>> from specjax import testing
    >>> model = testing.table_model(order=1, vocab_size=8)
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> given = (model, params, specjax.drafters.draft_model(model), params, jnp.array([[1, 2, 3]]))
    >>> state = specjax.init(*given, max_new_tokens=6)
    >>> while not state.is_done:
    ...     state, round = specjax.step(state)
    >>> specjax.finish(state).new_tokens() == specjax.generate(*given, max_new_tokens=6).new_tokens()
    True
    """
    call = prepare(
        model, params, drafter, drafter_params, prompts, prompt_lengths, key=key, max_new_tokens=max_new_tokens,
        sampling=sampling, processor=processor, verifier=verifier, controller=controller,
        controller_state=controller_state, drafter_state=drafter_state, max_draft_len=max_draft_len,
        stop_tokens=stop_tokens, seeds=seeds, inputs=inputs, capacity=capacity,
    )  # fmt: skip
    return State(call.setup, call.params, start_once(call.setup, call.params, call.request, call.learnt))


def step(state: State) -> tuple[State, Round]:
    """One round of every row that is active: plan, draft, score, verify, emit, commit.

    A pure function of the state, inside jit and outside. Outside jit, the buffers of the given state are reused:
    continue with the returned state. To keep a state, copy it first: `jax.tree.map(jnp.copy, state)`.

    Returns:
      The state after the round, and the Round: what was drafted, accepted and emitted, arrays [B, ...].

    Raises:
      ValueError: the state was used before.
    """
    check_unused(state)
    carry, info = _step(state.setup, state.params, state.carry)
    return dataclasses.replace(state, carry=carry), info


def finish(state: State, *, pad_token: int = 0) -> Generation:
    """The rows' texts so far, as `generate` returns them; rows that have not ended are ACTIVE."""
    return _finish(state.setup, state.carry, arguments.pad_token(pad_token))


def check_unused(state: State) -> None:
    """Raises ValueError if `state` is no State, or if an earlier step has reused its buffers."""
    if not isinstance(state, State):
        raise ValueError(f"state must be a specjax.State, what init and step return; got {type(state).__name__}.")
    leaves = [leaf for leaf in jax.tree.leaves(state.carry) if isinstance(leaf, jax.Array)]
    if not is_traced(leaves) and any(leaf.is_deleted() for leaf in leaves):
        raise ValueError(
            "this state was used before: its buffers are now those of the state that step or admit returned. Go on "
            "with that one, or keep a copy, jax.tree.map(jnp.copy, state)."
        )


@functools.partial(jax.jit, static_argnums=0)
def start_once(setup: Setup, params: Params, request: Request, learnt: Learnt) -> Carry:
    """`start`, compiled by itself."""
    batch, width = request.prompts.shape
    logs.tracing("prompts", rows=batch, prompt_width=width, capacity=setup.capacity, draft_len=setup.longest)
    return start(setup, params, request, learnt)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(setup: Setup, params: Params, carry: Carry) -> tuple[Carry, Round]:
    logs.tracing("step", rows=len(carry.rows.lengths), capacity=setup.capacity, draft_len=setup.longest)
    return one_round(setup, params, carry)


@functools.partial(jax.jit, static_argnums=0)
def _finish(setup: Setup, carry: Carry, pad_token: Array) -> Generation:
    return result(setup, carry, pad_token)
