"""The generation loop compiled for four TPU v5e chips, with no TPU: what XLA made of it is read from its own text.

An 8B-shaped Llama target and a 1B-shaped draft in bfloat16, tensor-parallel, batch 8, capacity 4096, 4 draft tokens.
Nothing is run. Controls at the end show that the detectors of hlo.py see what they are there for.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import cache, controllers, decode, drafters, hlo, models, verify
from specjax.rounds import Roles, State, start
from specjax.stream import dispatch
from specjax.types import Model, Sampling
from specjax.validate import Request

pytestmark = pytest.mark.tpu_aot

BATCH, CAPACITY, DRAFT_LEN, PROMPT = 8, 4096, 4, 128
GIB = 2**30
HBM = 15.75 * GIB  # of a v5e chip, less what the runtime keeps


def _config(width: int, inner: int, layers: int, head_dim: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": head_dim,
        "tie_word_embeddings": tied, "rope_theta": 500000.0,
    }  # fmt: skip


TARGET = _config(4096, 14336, 32, 128, tied=False)
DRAFT = _config(2048, 8192, 16, 64, tied=True)


@functools.cache
def _mesh() -> Mesh:
    # Once: a second description of the same topology holds devices that do not mix with those of the first.
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no TPU compiler here ({type(error).__name__}: {error})")
    return Mesh(np.array(topology.devices), ("model",))


def _on_mesh(tree: Any, spec_of: Any) -> Any:
    """The shapes of `tree` with a sharding each: `spec_of` (path, leaf) names the mesh axes."""

    def place(path, leaf):
        sharding = NamedSharding(_mesh(), PartitionSpec(*spec_of(jax.tree_util.keystr(path), leaf)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


def _weights(config: dict[str, Any]) -> Any:
    """Megatron's cut: projections into the layer by output, those out of it by input, the embedding by vocabulary."""

    def spec(name: str, leaf) -> tuple[str | None, ...]:
        if leaf.ndim == 1:
            return ()
        return (None, "model") if "o_proj" in name or "down_proj" in name else ("model",)

    abstract = models.build(config).abstract
    return _on_mesh(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract), spec)


def _by_heads(name: str, leaf) -> tuple[str | None, ...]:
    del name
    return (None, "model") if leaf.ndim == 4 else ()  # [B, Hkv, slots, D]


def _roles(target: Model) -> Roles:
    draft = drafters.draft_model(models.build(DRAFT).model)
    return Roles(target, draft, verify.rejection(), controllers.fixed(DRAFT_LEN))


def _request() -> Request:
    def array(*shape: int, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = array(BATCH, dtype=jnp.float32)
    sampling = Sampling(numbers, array(BATCH), numbers, numbers)
    key = jax.eval_shape(lambda: jax.random.key(0))
    ids = array(BATCH)
    request = Request(array(BATCH, PROMPT), ids, key, ids, sampling, array(BATCH, 2), ids)
    return _on_mesh(request, lambda name, leaf: ())


class Compiled(NamedTuple):
    """The loop and what is known of its arguments."""

    lowered: str  # StableHLO
    program: hlo.Program
    memory: Any
    first_traces: int  # how often the target was traced to compile the loop
    later_traces: int  # how often to call it again
    cache_bytes: int  # of both caches, per chip
    layer_bytes: int  # of the smallest buffer among them


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    traces = []
    model = models.build(TARGET).model

    def counting(*args, **kwargs):
        traces.append(1)
        return model.apply(*args, **kwargs)

    target = model._replace(apply=counting)
    params, drafter_params = _weights(TARGET), _weights(DRAFT)
    state: State = _on_mesh(
        jax.eval_shape(functools.partial(start, _roles(target), CAPACITY), params, drafter_params, _request()),
        _by_heads,
    )
    buffers = [*state.target_cache[:2], *state.drafter_state.cache[:2]]
    sizes = [_bytes_per_chip(leaf) for leaf in jax.tree.leaves(buffers)]

    traces.clear()
    lowered = dispatch.lower(_roles(target), CAPACITY, 64, params, drafter_params, state)
    first = len(traces)
    dispatch.trace(_roles(target), CAPACITY, 64, params, drafter_params, state)
    ready = lowered.compile()
    program = hlo.parse(ready.as_text())
    return Compiled(
        lowered.as_text(), program, ready.memory_analysis(), first, len(traces) - first, sum(sizes), min(sizes)
    )


def _bytes_per_chip(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def test_one_program(compiled):
    """Catches roles that hash differently from call to call, a second loop that the host would have to end, and an
    inner loop whose trip count became data."""
    assert compiled.first_traces > 0
    assert compiled.later_traces == 0
    assert hlo.unknown_loops(compiled.program) == [()]


def test_no_host_transfer(compiled):
    """Catches a debug print, a callback or a transfer left in the loop: each would stall every round."""
    assert hlo.host_calls(compiled.lowered) == []
    assert hlo.host_ops(compiled.program) == []


def test_generate_calls_no_host():
    """Catches the same in what surrounds the loop in `generate`: opening the rows, prefill, the first token."""
    roles, pad_token = _roles(models.build(TARGET).model), jax.ShapeDtypeStruct((), jnp.int32)
    lowered = decode._generate.lower(roles, CAPACITY, _weights(TARGET), _weights(DRAFT), _request(), None, pad_token)
    assert hlo.host_calls(lowered.as_text()) == []


def test_donated_caches_are_aliased(compiled):
    """Catches a cache that leaves the loop as another buffer than it came in, and one more copy of it in between."""
    memory = compiled.memory
    assert memory.alias_size_in_bytes >= compiled.cache_bytes
    assert memory.temp_size_in_bytes < compiled.cache_bytes / 8
    assert memory.peak_memory_in_bytes < HBM


def test_no_result_as_large_as_a_layers_cache(compiled):
    """Catches a copy, a relayout, a scatter, a gather or a rewrite of the cache, in the loop or around it."""
    found = hlo.large_results(compiled.program, compiled.layer_bytes)
    assert found == []


def test_few_buffers_travel_on_chip_and_back(compiled):
    """Catches XLA fetching the caches into on-chip memory to write the new rows there, and carrying them back."""
    assert hlo.spilled_bytes(compiled.program, compiled.layer_bytes) < compiled.cache_bytes / 8


def test_two_all_reduces_per_layer(compiled):
    """Catches a sharding that XLA could not follow: it shows as gathers and permutes, or as one more reduction."""
    activations, others = Counter(), []
    for step in hlo.collectives(compiled.program):
        for shape in step.instruction.shapes:
            if step.instruction.op.startswith("all-reduce") and shape.dtype == "bf16":
                activations[step.loops, shape.dims[-1]] += 1
            else:
                others.append((shape.bytes, step.instruction.text[:100]))
    rounds, draft_steps = ("while[?]",), ("while[?]", f"while[{DRAFT_LEN - 1}]")
    # Two per layer and one for the embedding; the draft model's first forward stands before its loop.
    assert activations == {(rounds, 4096): 65, (rounds, 2048): 33, (draft_steps, 2048): 33}
    # A few numbers per row each: the logits, 128256 columns wide, stay where they were made.
    assert max(others)[0] < 4096


class Toy(NamedTuple):
    """A small loop over one layer's cache, or over a stack of them."""

    program: hlo.Program
    memory: Any
    cache_bytes: int
    layer_bytes: int


def _toy(body: Any, *, layers: int = 0, heads_at: int = 1, donate: bool = True) -> Toy:
    """Compiles a loop of body(buffers, starts, new) -> buffers over keys and values with 8 heads on axis `heads_at`."""
    shape = [BATCH, CAPACITY, 128]
    shape.insert(heads_at, 8)
    stack = (layers,) if layers else ()
    axes = (*(None,) * (len(stack) + heads_at), "model")

    def run(buffers, starts, new):
        def step(carry):
            return body(*carry, new), carry[1] + 1

        return lax.while_loop(lambda carry: jnp.any(carry[1] < CAPACITY), step, (buffers, starts))

    buffer = jax.ShapeDtypeStruct((*stack, *shape), jnp.bfloat16)
    buffers = _on_mesh((buffer, buffer), lambda name, leaf: axes)
    new = _on_mesh(jax.ShapeDtypeStruct((BATCH, 8, 1, 128), jnp.bfloat16), _by_heads)
    starts = _on_mesh(jax.ShapeDtypeStruct((BATCH,), jnp.int32), _by_heads)
    ready = jax.jit(run, donate_argnums=0 if donate else ()).lower(buffers, starts, new).compile()
    buffer_bytes = _bytes_per_chip(buffers[0])
    return Toy(hlo.parse(ready.as_text()), ready.memory_analysis(), 2 * buffer_bytes, buffer_bytes // (layers or 1))


def _mix(buffers, new):
    """Attention of one token over every slot, [B, Hkv, 1, D]."""
    keys, values = buffers
    scores = jnp.einsum("bhtd,bhsd->bhts", new, keys, preferred_element_type=jnp.float32)
    return jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores, -1).astype(new.dtype), values)


def _in_place(buffers, starts, new):
    mixed = _mix(buffers, new)
    return cache.write_rows(buffers, (mixed, mixed), starts)


def _slots_before_heads(buffers, starts, new):
    mixed = _mix([buffer.swapaxes(1, 2) for buffer in buffers], new).swapaxes(1, 2)

    def write(row, written):
        piece = lax.dynamic_slice_in_dim(mixed, row, 1, 0)
        return tuple(lax.dynamic_update_slice(buffer, piece, (row, starts[row], 0, 0)) for buffer in written)

    return lax.fori_loop(0, BATCH, write, buffers)


def _scanned(buffers, starts, new):
    return lax.scan(lambda x, layer: (x, _in_place(layer, starts, x)), new, buffers)[1]


def _scattered(buffers, starts, new):
    mixed = _mix(buffers, new)[:, :, 0]
    return tuple(buffer.at[jnp.arange(BATCH), :, starts].set(mixed) for buffer in buffers)


def _selected(buffers, starts, new):
    is_here = jnp.arange(CAPACITY)[None, None, :, None] == starts[:, None, None, None]
    mixed = _mix(buffers, new)
    return tuple(jnp.where(is_here, mixed, buffer) for buffer in buffers)


def _repeated(buffers, starts, new):
    return lax.fori_loop(0, jnp.min(starts), lambda index, buffers: _in_place(buffers, starts, new), buffers)


def test_control_in_place():
    """Catches detectors that flag everything, which would make the other controls worthless."""
    toy = _toy(_in_place)
    assert hlo.large_results(toy.program, toy.layer_bytes) == []
    assert hlo.unknown_loops(toy.program) == [()]
    assert toy.memory.alias_size_in_bytes >= toy.cache_bytes


def test_control_without_donation():
    """Catches an alias size that says nothing: without donation it must be 0."""
    assert _toy(_in_place, donate=False).memory.alias_size_in_bytes == 0


@pytest.mark.parametrize(
    ("body", "shape"),
    [(_slots_before_heads, {"heads_at": 2}), (_scanned, {"layers": 4}), (_scattered, {}), (_selected, {})],
)
def test_control_that_moves_the_cache(body, shape):
    """Catches a blind detector: a layout that attention transposes, a cache that goes through a scan as xs and ys, a
    scatter and a select over all slots each rewrite whole layers."""
    toy = _toy(body, **shape)
    found = hlo.large_results(toy.program, toy.layer_bytes)
    assert found != []


def test_control_with_a_loop_of_unknown_length():
    """Catches a reader that takes every loop for a counted one."""
    assert hlo.unknown_loops(_toy(_repeated).program) == [(), ("while[?]",)]


def test_control_with_a_callback():
    """Catches a pattern that no longer matches what JAX calls a callback."""

    def step(x):
        jax.debug.print("{}", x)
        return x + 1

    lowered = jax.jit(lambda x: lax.while_loop(lambda x: x < 9, step, x)).lower(jnp.int32(0))
    assert hlo.host_calls(lowered.as_text()) != []
