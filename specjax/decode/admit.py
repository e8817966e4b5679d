"""Empty rows, and requests that are put into rows between rounds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from specjax import integers, logs
from specjax.decode import arguments
from specjax.decode.arguments import Request
from specjax.decode.by_hand import check_unused
from specjax.decode.call import prepare
from specjax.decode.start import open_slots as opened_slots
from specjax.decode.start import start
from specjax.decode.state import Carry, State
from specjax.types import (
    Array,
    Controller,
    Drafter,
    Model,
    Params,
    Processor,
    PyTree,
    Sampling,
    Setup,
    Verifier,
)


def open_slots(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    batch: int,
    *,
    capacity: int,
    sampling: Sampling = Sampling(),
    num_stop_tokens: int = 0,
    processor: Processor | None = None,
    verifier: Verifier | None = None,
    controller: Controller | None = None,
    inputs: PyTree | None = None,
) -> State:
    """Makes empty rows; `admit` puts requests into them.

    Args:
      model, params, drafter, drafter_params, processor, verifier, controller: as for `generate`.
      batch: B, the number of slots.
      capacity: the most tokens that a row may hold, prompt included.
      sampling: requests may use those optional fields (penalties, bias, bad words, minimum length) that are not None
        here; the values come from the requests.
      num_stop_tokens: the most stop tokens of a request.
      inputs: those of any request, repeated to [B, ...], for a target that takes inputs.

    >>> import jax, jax.numpy as jnp, specjax
    >>> from specjax import testing
    >>> model = testing.table_model(order=1, vocab_size=8)
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> given = (model, params, specjax.drafters.draft_model(model), params)
    >>> state = specjax.open_slots(*given, 2, capacity=16)
    >>> state = specjax.admit(state, 1, jnp.array([3, 4]), seed=7, max_new_tokens=5)
    >>> while not state.is_done:
    ...     state, round = specjax.step(state)
    >>> [len(tokens) for tokens in specjax.finish(state).new_tokens()]
    [0, 5]
    """
    batch, num_stop_tokens = (
        integers.static(batch, "batch"),
        integers.static(num_stop_tokens, "num_stop_tokens", least=0),
    )
    call = prepare(
        model, params, drafter, drafter_params, np.zeros((batch, 1), np.int32), None, key=None, max_new_tokens=1,
        sampling=sampling, processor=processor, verifier=verifier, controller=controller,
        stop_tokens=np.full((num_stop_tokens,), -1), seeds=None, inputs=inputs, capacity=capacity,
    )  # fmt: skip
    return State(call.setup, call.params, _open_slots(call.setup, call.params, call.request))


def admit(
    state: State,
    row: ArrayLike,
    prompt: ArrayLike,
    prompt_length: ArrayLike | None = None,
    *,
    seed: ArrayLike,
    key: Array | None = None,
    max_new_tokens: ArrayLike = 128,
    sampling: Sampling = Sampling(),
    max_draft_len: ArrayLike | None = None,
    stop_tokens: ArrayLike | Sequence[int] = (),
    inputs: PyTree | None = None,
) -> State:
    """Puts a new request into a row, whatever the row did before; the other rows are not affected.

    The row then emits the tokens that `generate` would emit for this request alone, with the same key and this seed.
    The row's state of drafter and controller begins anew; state that rows share stays.

    Args:
      state: from `init` or `step`; its buffers are reused, as by `step`.
      row: [] int32 in 0..B-1.
      prompt: [P] int32 ids, padded on the right. Another width compiles another program: use few.
      prompt_length: [] int32 in 1..P; None means P.
      seed: [] int32; see `generate`.
      key, max_new_tokens, sampling, max_draft_len, stop_tokens, inputs: of this request, as for `generate`; sampling
        has the same optional fields as the state's, and there are no more stop_tokens than the state has room for.

    Raises:
      ValueError: the request does not fit the state.
    """
    check_unused(state)
    setup, rows = state.setup, state.carry.rows
    width, batch = rows.stop_tokens.shape[1], rows.lengths.shape[0]
    stops = np.asarray(stop_tokens)
    if stops.ndim != 1 or len(stops) > width:
        raise ValueError(
            f"stop_tokens must be [n] with n up to {width}, as many as the state was opened for; got {stops.shape}: "
            "open it with as many, padded with -1."
        )
    prompt = jnp.asarray(integers.whole(prompt, "prompt", "[P]"))
    if prompt.ndim != 1:
        raise ValueError(f"prompt must have shape [P], got {prompt.shape}: one request a call.")
    request = arguments.request(
        setup.model, prompt[None], None if prompt_length is None else jnp.asarray(prompt_length)[None], key=key,
        max_new_tokens=max_new_tokens, sampling=sampling, max_draft_len=max_draft_len,
        stop_tokens=[*stops.tolist(), *[-1] * (width - len(stops))],
        seeds=jnp.asarray(seed)[None], inputs=inputs, capacity=setup.capacity,
    )  # fmt: skip
    row = integers.exact(integers.whole(row, "row", "[]"), "row", least=0, most=batch - 1)
    arrays = request.arrays
    if arrays.sampling.logit_bias is not None:  # a bias for all rows lacks the row axis
        bias = jnp.atleast_2d(arrays.sampling.logit_bias)
        arrays = arrays._replace(sampling=arrays.sampling._replace(logit_bias=bias))
    carry = _admit(setup, state.params, state.carry, arrays, jnp.asarray(row))
    return dataclasses.replace(state, carry=carry)


@functools.partial(jax.jit, static_argnums=0)
def _open_slots(setup: Setup, params: Params, request: Request) -> Carry:
    return opened_slots(setup, params, request)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admit(setup: Setup, params: Params, carry: Carry, request: Request, row: Array) -> Carry:
    logs.tracing("admit", prompt_width=request.prompts.shape[1], capacity=setup.capacity)
    one = start(setup, params, request)
    axes = row_axes(setup, params, carry, request)

    def put(old: Array, new: Array, axis: int) -> Array:
        if axis < 0:
            return old
        return lax.dynamic_update_slice_in_dim(old, new, row, axis)

    return jax.tree.map(put, carry, one, axes)


def row_axes(setup: Setup, params: Params, carry: Carry, request: Request) -> Any:
    """The row axis of each leaf of a carry; -1 where the rows share the leaf.

    It compares the shapes for one row and for two rows, so authors of models and drafters need not name the axis.

    Raises:
      ValueError: a leaf has two such axes, or the carry has another structure than `start` makes with this request.
    """

    def opened(rows: int) -> Carry:
        repeated = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, rows, 0) if leaf.ndim else leaf, request._replace(key=None)
        )
        return start(setup, params, repeated._replace(key=request.key))

    batch = carry.rows.lengths.shape[0]
    one, two = (jax.eval_shape(functools.partial(opened, rows)) for rows in (1, 2))
    if jax.tree.structure(one) != jax.tree.structure(carry):
        raise ValueError(
            "this request does not fit the state: its sampling must have the fields that the state was opened with "
            "(penalties, bias, bad words and minimum length are None or not)."
        )

    def axis(path: Any, small: Any, large: Any, whole: Any) -> int:
        found = [i for i, sizes in enumerate(zip(small.shape, large.shape, strict=True)) if sizes[0] != sizes[1]]
        if len(found) > 1:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has more than one axis of rows: {large.shape} for two rows."
            )
        if not found:
            return -1
        place = found[0]
        if whole.shape != (*small.shape[:place], batch, *small.shape[place + 1 :]):
            raise ValueError(
                f"this request does not fit the state: {jax.tree_util.keystr(path)} is {whole.shape} in it, and "
                f"{small.shape} for the request's one row."
            )
        return place

    return jax.tree_util.tree_map_with_path(axis, one, two, carry)
