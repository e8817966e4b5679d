"""Controls: detectors see a cache that moves, and stay silent where none does; else the other tests prove nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from tpu import BATCH, CAPACITY, toy

from specjax import cache
from specjax.aot import hlo
from specjax.kernels import write

pytestmark = pytest.mark.tpu_aot


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
    small = toy(_in_place)
    assert hlo.large_results(small.program, small.layer_bytes) == []
    assert hlo.unknown_loops(small.program) == [()]
    assert small.memory.alias_size_in_bytes >= small.cache_bytes


def test_control_without_donation():
    """Catches an alias size that says nothing: without donation it must be 0."""
    assert toy(_in_place, donate=False).memory.alias_size_in_bytes == 0


@pytest.mark.parametrize(
    ("body", "shape"),
    [(_slots_before_heads, {"heads_at": 2}), (_scanned, {"layers": 4}), (_scattered, {}), (_selected, {})],
)
def test_control_that_moves_the_cache(body, shape):
    """Catches a blind detector: a layout that attention transposes, a cache that goes through a scan as xs and ys, a
    scatter and a select over all slots each rewrite whole layers."""
    small = toy(body, **shape)
    found = hlo.large_results(small.program, small.layer_bytes)
    assert found != []


def _by_a_kernel(buffers, starts, new):
    mixed = _mix(buffers, new)
    cut = PartitionSpec(None, "model")
    return jax.shard_map(
        write.write_rows, in_specs=((cut, cut), (cut, cut), PartitionSpec()), out_specs=(cut, cut), check_vma=False
    )(buffers, (mixed, mixed), starts)


def test_control_of_a_kernel(monkeypatch):
    """Catches a detector that trusts every kernel: one whose results are not its operands moves the cache."""
    small = toy(_by_a_kernel)
    assert any(hlo.is_kernel(step.instruction) for step in small.program.walk())
    assert hlo.large_results(small.program, small.layer_bytes) == []
    monkeypatch.setattr(write.pl, "pallas_call", functools.partial(_forgetful, write.pl.pallas_call))
    small = toy(_by_a_kernel)
    assert "custom-call" in {found[-2] for found in hlo.large_results(small.program, small.layer_bytes)}


def _forgetful(pallas_call, *args, input_output_aliases, **kwargs):
    return pallas_call(*args, **kwargs)


def test_control_with_a_loop_of_unknown_length():
    """Catches a reader that takes every loop for a counted one."""
    assert hlo.unknown_loops(toy(_repeated).program) == [(), ("while[?]",)]


def test_control_with_a_callback():
    """Catches a pattern that no longer matches what JAX calls a callback."""

    def step(x):
        jax.debug.print("{}", x)
        return x + 1

    lowered = jax.jit(lambda x: lax.while_loop(lambda x: x < 9, step, x)).lower(jnp.int32(0))
    assert hlo.host_calls(lowered.as_text()) != []
