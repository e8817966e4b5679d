"""A call of `generate`, `stream` or `init`: its arguments checked and put together."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from specjax import controllers, verify
from specjax.decode import arguments, parts
from specjax.decode.arguments import Request
from specjax.decode.start import open_request
from specjax.decode.state import Learnt
from specjax.sharding import globally
from specjax.types import Controller, Drafter, Model, Params, Processor, PyTree, Setup, Verifier


class Call(NamedTuple):
    """The static setup of a program, and its arguments."""

    setup: Setup
    params: Params
    request: Request
    learnt: Learnt


def prepare(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    prompts: Any,
    prompt_lengths: Any,
    *,
    processor: Processor | None = None,
    verifier: Verifier | None = None,
    controller: Controller | None = None,
    controller_state: PyTree | None = None,
    drafter_state: PyTree | None = None,
    **options: Any,
) -> Call:
    """The call; see `generate` for the arguments. Raises ValueError for arguments that are wrong."""
    parts.check_kinds(model, drafter, verifier, controller)
    parts.check_processor(processor)
    verifier, controller = verifier or verify.rejection(), controller or controllers.fixed(5)
    request = arguments.request(model, prompts, prompt_lengths, **options)
    setup = Setup(model, drafter, verifier, controller, request.capacity, processor)
    parts.check_fit(setup, request.arrays.sampling)
    arrays, both = request.arrays, Params(params, drafter_params)
    parts.check_controller_state(controller, controller_state, request)
    open_rows = functools.partial(open_request, model, arrays, setup.slots)
    parts.check_drafter_state(setup, both, open_rows, arrays.inputs, drafter_state)
    arrays = globally(model.layout, arrays)
    return Call(setup, both, arrays, Learnt(controller_state, drafter_state))
