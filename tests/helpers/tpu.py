"""What tests of programs for TPUs share: the compiler, or a skip that says why not; small loops over one cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from specjax.aot import hlo, planning, programs
from specjax.aot.placement import bytes_per_chip, state_on
from specjax.aot.shapes import Shaped
from specjax.aot.topology import make_mesh
from specjax.sharding import layout

BATCH, CAPACITY, DRAFT_LEN, PROMPT = 8, 4096, 4, 128


def workload(target: Shaped, draft: Shaped, topology: str, **changes: Any) -> programs.Workload:
    """The usual size of a generation on these chips."""
    options = {
        "batch": BATCH, "capacity": CAPACITY, "draft_len": DRAFT_LEN, "prompt_width": PROMPT, "dtype": "bfloat16",
        "axes": None, **changes,
    }  # fmt: skip
    try:
        return planning.workload(target, draft, topology, **options)
    except ImportError as error:
        pytest.skip(f"no TPU compiler here ({error})")


def activations(program: hlo.Program) -> tuple[dict, int]:
    """How often all-reduces of activations run, by loop and width, and the bytes of the largest other collective."""
    found, largest_other = {}, 0
    for step in hlo.collectives(program):
        for shape in step.instruction.shapes:
            if step.instruction.op.startswith("all-reduce") and shape.dtype == "bf16":
                place = (step.loops, shape.dims[-1])
                found[place] = found.get(place, 0) + 1
            else:
                largest_other = max(largest_other, shape.bytes)
    return found, largest_other


class Toy(NamedTuple):
    """A small loop over one layer's cache, or over a stack of them."""

    program: hlo.Program
    memory: Any
    cache_bytes: int
    layer_bytes: int


def toy(body: Any, *, layers: int = 0, heads_at: int = 1, donate: bool = True) -> Toy:
    """Compiles a loop of body(buffers, starts, new) -> buffers over keys and values with 8 heads on axis `heads_at`."""
    try:
        there = layout(make_mesh("v5e:2x2", {"model": 4}))
    except ImportError as error:
        pytest.skip(f"no TPU compiler here ({error})")
    shape = [BATCH, CAPACITY, 128]
    shape.insert(heads_at, 8)
    stack = (layers,) if layers else ()
    axes = (*(None,) * (len(stack) + heads_at), "model")

    def run(buffers, starts, new):
        def step(carry):
            return body(*carry, new), carry[1] + 1

        return lax.while_loop(lambda carry: jnp.any(carry[1] < CAPACITY), step, (buffers, starts))

    sharding = jax.sharding.NamedSharding(there.mesh, jax.sharding.PartitionSpec(*axes))
    buffer = jax.ShapeDtypeStruct((*stack, *shape), jnp.bfloat16, sharding=sharding)
    new = state_on(there, jax.ShapeDtypeStruct((BATCH, 8, 1, 128), jnp.bfloat16), BATCH)
    starts = state_on(there, jax.ShapeDtypeStruct((BATCH,), jnp.int32), BATCH)
    with jax.set_mesh(there.mesh):  # for shard_map
        ready = jax.jit(run, donate_argnums=0 if donate else ()).lower((buffer, buffer), starts, new).compile()
    size = bytes_per_chip(buffer)
    return Toy(hlo.parse(ready.as_text()), ready.memory_analysis(), 2 * size, size // (layers or 1))
