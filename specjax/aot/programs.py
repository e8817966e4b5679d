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
from specjax.decode.arguments import Request
from specjax.decode.by_hand import start_once
from specjax.decode.plain import plain_setup
from specjax.decode.start import start
from specjax.decode.state import Carry, Learnt
from specjax.decode.stream import dispatch
from specjax.sharding import Layout
from specjax.types import Model, Params, Sampling, Setup

# What a part of a round is found by in the compiled program; see `labelled`.
TARGET, DRAFT, WRITE = "target_forward", "draft_forward", "cache_write"
_ROUNDS_PER_DISPATCH = 64
_MAX_STOP_TOKENS = 2
_BYTES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Workload(NamedTuple):
    """The models, sizes and mesh of a generation."""

    target: Shaped
    draft: Shaped
    layout: Layout
    batch: int
    capacity: int  # tokens a row may hold
    draft_len: int  # K
    prompt_width: int  # P
    dtype: Any  # of parameters and caches


class Memory(NamedTuple):
    """Memory of one program, in bytes per chip."""

    arguments: int
    temporaries: int
    aliased: int  # arguments that are results too, and take no room twice
    outputs: int
    code: int
    peak: int  # the most that is live at once, code apart


class Compiled(NamedTuple):
    """One compiled program; or the memory that it would need, if it does not fit."""

    name: str
    seconds: float  # of the compiler
    memory: Memory | None  # None where it does not fit
    program: hlo.Program | None
    needed: int | None  # bytes per chip, where it does not fit
    lowered: str | None  # StableHLO


def labelled(target: Model, draft: Model, draft_len: int, capacity: int) -> Setup:
    """A generation by a draft model, rejection and a fixed K; named scopes mark its parts in the HLO."""

    def label(model: Model, name: str) -> Model:
        return model._replace(apply=jax.named_scope(name)(model.apply), commit=jax.named_scope(WRITE)(model.commit))

    drafter = drafters.draft_model(label(draft, DRAFT))
    return Setup(label(target, TARGET), drafter, verify.rejection(), controllers.fixed(draft_len), capacity)


class Arguments(NamedTuple):
    """The arguments of all programs of one workload: shapes with shardings."""

    setup: Setup
    params: Params
    request: Request


def arguments(work: Workload) -> Arguments:
    """Made once per workload: setups hash by identity, and a second set would be traced anew."""
    setup = labelled(work.target.built.model, work.draft.built.model, work.draft_len, work.capacity)
    params = Params(*(params_on(part, work.dtype) for part in (work.target, work.draft)))
    return Arguments(setup, params, _request(work))


def compile_prefill(work: Workload, given: Arguments) -> Compiled:
    """Empty caches, the prompts read by both models, the first token."""
    return compiled("prefill", start_once.lower(given.setup, given.params, given.request, Learnt()))


def _carry(work: Workload, setup: Setup, given: Arguments) -> Carry:
    """Shapes of what rounds pass on, with a sharding each."""
    shapes = jax.eval_shape(functools.partial(start, setup), given.params, given.request)
    return state_on(work.layout, shapes, work.batch)


def rounds_state(work: Workload, given: Arguments) -> Carry:
    """Shapes of what rounds of speculation pass on."""
    return _carry(work, given.setup, given)


def lower_rounds(given: Arguments, carry: Carry) -> Any:
    """The loop of speculation rounds, with the carry donated: what `stream` and `specjax generate` run."""
    return dispatch.lower(given.setup, _ROUNDS_PER_DISPATCH, given.params, carry)


def compile_rounds(work: Workload, given: Arguments) -> Compiled:
    """The same, compiled."""
    return compiled("rounds", lower_rounds(given, rounds_state(work, given)))


def compile_plain(work: Workload, given: Arguments) -> Compiled:
    """The autoregressive loop, with its carry donated."""
    setup = plain_setup(given.setup.model, work.capacity)
    carry = _carry(work, setup, given)
    return compiled("plain", dispatch.lower(setup, _ROUNDS_PER_DISPATCH, given.params._replace(drafter=None), carry))


def compile_forward(work: Workload, given: Arguments, tokens: int) -> Compiled:
    """One target pass over `tokens` tokens a row, the cache only read: no sampling, no write."""
    model = given.setup.model
    slots = work.capacity + work.draft_len + 1
    cache = state_on(
        work.layout,
        jax.eval_shape(lambda params: model.init_cache(params, work.batch, slots), given.params.target),
        work.batch,
    )
    ids = state_on(work.layout, jax.ShapeDtypeStruct((work.batch, tokens), jnp.int32), work.batch)

    def run(params, ids, cache):
        return model.apply(params, ids, cache, model.init_block(params, work.batch, tokens)).logits

    return compiled(f"forward of {tokens}", jax.jit(run).lower(given.params.target, ids, cache))


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
