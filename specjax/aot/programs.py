"""The programs of a generation, compiled for described chips: prefill, rounds of speculation, plain decoding."""

from __future__ import annotations

import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax import controllers, drafters, verify
from specjax.aot import hlo
from specjax.aot.placement import params_on, state_on
from specjax.aot.shapes import Shaped
from specjax.decode.api import plain_loop
from specjax.decode.arguments import Request
from specjax.decode.state import Roles, open_request, start
from specjax.decode.stream import dispatch
from specjax.sharding import Layout
from specjax.types import Model, PyTree, Sampling

# What a part of a round is found by in the compiled program; see `labelled`.
TARGET, DRAFT, WRITE = "target_forward", "draft_forward", "cache_write"
_ROUNDS_PER_DISPATCH = 64
_MAX_STOP_TOKENS = 2
_BYTES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Workload(NamedTuple):
    """What is generated, and where."""

    target: Shaped
    draft: Shaped
    layout: Layout
    batch: int
    capacity: int  # tokens a row may hold
    draft_len: int  # K
    prompt_width: int  # P
    dtype: Any  # of parameters and caches


class Memory(NamedTuple):
    """Of one program, in bytes per chip."""

    arguments: int
    temporaries: int
    aliased: int  # arguments that are results too, and take no room twice
    outputs: int
    code: int
    peak: int  # the most that is live at once, code apart


class Compiled(NamedTuple):
    """One program, or the room that it lacks."""

    name: str
    seconds: float  # of the compiler
    memory: Memory | None  # None where it does not fit
    program: hlo.Program | None
    needed: int | None  # bytes per chip, where it does not fit
    lowered: str | None  # StableHLO


def labelled(target: Model, draft: Model, draft_len: int) -> Roles:
    """The roles of a generation by a draft model, rejection and a fixed K; each part says in the HLO whose it is."""

    def label(model: Model, name: str) -> Model:
        return model._replace(apply=jax.named_scope(name)(model.apply), commit=jax.named_scope(WRITE)(model.commit))

    drafter = drafters.draft_model(label(draft, DRAFT))
    return Roles(label(target, TARGET), drafter, verify.rejection(), controllers.fixed(draft_len))


class Arguments(NamedTuple):
    """Of every program of one workload: shapes with shardings."""

    roles: Roles
    params: PyTree
    drafter_params: PyTree
    request: Request


def arguments(work: Workload) -> Arguments:
    """Made once per workload: roles hash by identity, and a second set would be traced anew."""
    roles = labelled(work.target.built.model, work.draft.built.model, work.draft_len)
    params, drafter_params = (params_on(part, work.dtype) for part in (work.target, work.draft))
    return Arguments(roles, params, drafter_params, _request(work))


def compile_prefill(work: Workload, given: Arguments) -> Compiled:
    """Empty caches, the prompts read by both models, the first token."""
    run = jax.jit(functools.partial(start, given.roles, work.capacity))
    return compiled("prefill", run.lower(given.params, given.drafter_params, given.request))


def rounds_state(work: Workload, given: Arguments) -> Any:
    """Shapes of the state that rounds pass on, with a sharding each."""
    run = functools.partial(start, given.roles, work.capacity)
    return state_on(work.layout, jax.eval_shape(run, given.params, given.drafter_params, given.request), work.batch)


def lower_rounds(work: Workload, given: Arguments, state: Any) -> Any:
    """The loop of speculation rounds, with the state donated: what `stream` and `specjax generate` run."""
    return dispatch.lower(given.roles, work.capacity, _ROUNDS_PER_DISPATCH, given.params, given.drafter_params, state)


def compile_rounds(work: Workload, given: Arguments) -> Compiled:
    """The same, compiled."""
    return compiled("rounds", lower_rounds(work, given, rounds_state(work, given)))


def compile_plain(work: Workload, given: Arguments) -> Compiled:
    """The autoregressive loop, with its state donated."""
    model = given.roles.model

    def opened(params, request):
        slots = work.capacity + 1
        return open_request(model, request, slots), model.init_cache(params, work.batch, slots)

    state = state_on(work.layout, jax.eval_shape(opened, given.params, given.request), work.batch)
    run = jax.jit(functools.partial(plain_loop, model, None, work.capacity), donate_argnums=1)
    return compiled("plain", run.lower(given.params, state))


def compile_forward(work: Workload, given: Arguments, tokens: int) -> Compiled:
    """One target pass over `tokens` tokens a row, the cache only read: no sampling, no write."""
    model = given.roles.model
    slots = work.capacity + work.draft_len + 1
    cache = state_on(
        work.layout,
        jax.eval_shape(lambda params: model.init_cache(params, work.batch, slots), given.params),
        work.batch,
    )
    ids = state_on(work.layout, jax.ShapeDtypeStruct((work.batch, tokens), jnp.int32), work.batch)

    def run(params, ids, cache):
        return model.apply(params, ids, cache, model.init_block(params, work.batch, tokens)).logits

    return compiled(f"forward of {tokens}", jax.jit(run).lower(given.params, ids, cache))


def compiled(name: str, lowered: Any) -> Compiled:
    """Compiles, and turns the compiler's "out of memory" into a number."""
    began = time.perf_counter()
    try:
        ready = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return Compiled(name, time.perf_counter() - began, None, None, needed, lowered.as_text())
    seconds = time.perf_counter() - began
    found = ready.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes, found.temp_size_in_bytes, found.alias_size_in_bytes,
        found.output_size_in_bytes, found.generated_code_size_in_bytes, found.peak_memory_in_bytes,
    )  # fmt: skip
    return Compiled(name, seconds, memory, hlo.parse(ready.as_text()), None, lowered.as_text())


def needed_bytes(error: str) -> int | None:
    """What a program needs, from the message of a CompileTimeHbmOom; None for any other error.

    >>> needed_bytes("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    ...              "required for HLO temporaries (45.20G) exceeds available HBM (15.75G).") // 2**30
    45
    """
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", error)
    return int(float(sizes[0][0]) * _BYTES[sizes[0][1]]) if sizes else None


def _request(work: Workload) -> Request:
    def array(*shape: int, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = work.batch
    ids, numbers = array(batch), array(batch, dtype=jnp.float32)
    sampling = Sampling(numbers, ids, numbers, numbers)
    key = jax.eval_shape(lambda: jax.random.key(0))
    stops = array(batch, _MAX_STOP_TOKENS)
    return state_on(
        work.layout, Request(array(batch, work.prompt_width), ids, key, ids, ids, sampling, stops, ids), batch
    )
