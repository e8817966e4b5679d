"""Kernels for TPU against NumPy, interpreted on CPU, and everything that they must not stand in the way of."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from specjax import cache as kv
from specjax.sharding import layout, make_mesh
from specjax.tpu import write
from specjax.tpu.backed import on_tpu

SLOTS = 256


def _written(buffer: np.ndarray, new: np.ndarray, starts: list[int]) -> np.ndarray:
    """The reference: row by row, from the last slot that leaves room where a start is later."""
    out = buffer.copy()
    width = new.shape[2]
    for row, start in enumerate(starts):
        at = min(start, buffer.shape[2] - width)
        out[row, :, at : at + width] = new[row]
    return out


def _arrays(count, width, dtype=jnp.float32, heads=2, batch=4, dim=128):
    keys = jax.random.split(jax.random.key(width), 2 * count)
    buffers = tuple(jax.random.normal(key, (batch, heads, SLOTS, dim), dtype) for key in keys[:count])
    return buffers, tuple(jax.random.normal(key, (batch, heads, width, dim), dtype) for key in keys[count:])


@pytest.mark.parametrize("starts", [[0, 31, 124, 255], [15, 16, 127, 239]])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("width", "dtype", "heads"),
    [(1, jnp.float32, 1), (5, jnp.bfloat16, 2), (6, jnp.float32, 2), (17, jnp.bfloat16, 3), (16, jnp.float32, 1)],
)
def test_written_as_by_numpy(width, dtype, heads, dim, starts, monkeypatch, capfd):
    """Catches a window that misses new slots across a tile's edge or at the buffer's end, old slots lost beside them,
    rows, buffers or kernels mixed up, and a window read or sent off before it is there."""
    monkeypatch.setattr(write, "_MOST_BUFFERS", 2)  # so that three take two kernels
    buffers, new = _arrays(3, width, dtype, heads, dim=dim)
    run = functools.partial(write.write_rows, interpret=pltpu.InterpretParams(detect_races=True))
    got = jax.jit(run)(buffers, new, jnp.asarray(starts))
    for out, buffer, update in zip(got, buffers, new, strict=True):
        np.testing.assert_array_equal(out, _written(np.asarray(buffer), np.asarray(update), starts))
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("width", "dim", "dtype", "fits"),
    [
        (1, 128, jnp.float32, True),
        (17, 256, jnp.bfloat16, True),
        (18, 128, jnp.bfloat16, False),  # a prompt
        (5, 64, jnp.bfloat16, True),
        (5, 96, jnp.bfloat16, False),  # XLA would lay the cache out anew
        (5, 192, jnp.bfloat16, False),
        (5, 128, jnp.float16, False),
        (5, 8, jnp.float32, False),
    ],
)
def test_what_the_kernel_takes(width, dim, dtype, fits):
    """Catches shapes that Mosaic refuses, or that cost a copy of the cache, sent to the kernel all the same."""
    (buffer,), (new,) = _arrays(1, width, dtype, dim=dim)
    assert write.is_fit(buffer, new) == fits


def _cache(batch=2, width=3):
    buffers, new = _arrays(2, width, batch=batch)
    cache = kv.KVCache(buffers[:1], buffers[1:], jnp.arange(batch, dtype=jnp.int32) * 50 + 3)
    block = kv.KVBlock(new[:1], new[1:], jnp.zeros((batch, width), jnp.int32), jnp.int32(width))
    return cache, block


@pytest.fixture
def alone(monkeypatch):
    """As on a machine with one device: the tests' eight would keep kernels out."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_a_commit_that_may_run_on_tpu_can_be_mapped_and_differentiated(alone):
    """Catches a kernel without rules of its own: every platform's form is traced on every platform, so a user's vmap
    or gradient on CPU would fail for a form that only TPUs run."""
    cache, block = _cache()
    keep = jnp.array([2, 0])
    keys, values = (
        kv.write_rows(buffers, new, cache.lengths) for buffers, new in ((cache[0], block[0]), (cache[1], block[1]))
    )
    for_tpu = jax.jit(lambda *args: kv.commit(*args)).trace(cache, block, keep).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in for_tpu.as_text()

    got = kv.commit(cache, block, keep)
    np.testing.assert_array_equal(got.keys[0], keys[0])
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache)
    mapped = jax.vmap(kv.commit, (0, None, None))(many, block, keep)
    np.testing.assert_array_equal(mapped.values[0][1], values[0])

    def total(values):
        return jnp.sum(jnp.sin(kv.commit(cache, block._replace(values=values), keep).values[0]))

    gradient = jax.grad(total)(block.values)[0]
    np.testing.assert_allclose(gradient, jnp.cos(block.values[0]), rtol=1e-5)
    np.testing.assert_allclose(
        jax.jvp(total, (block.values,), (block.values,))[1], jnp.sum(gradient * block.values[0]), rtol=1e-4
    )


def test_a_kernel_can_be_exported_for_tpu_and_cuda(alone):
    """Catches a kernel lowered for CUDA too, which refuses it: JAX lowers each form for every platform asked for."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it: pip install flatbuffers")
    (cache, block), keep = _cache(), jnp.array([2, 0])

    def run(buffers, new):
        after = kv.commit(cache._replace(keys=(buffers,)), block._replace(keys=(new,)), keep)
        return after.keys[0]

    args = cache.keys[0], block.keys[0]
    exported = export.export(jax.jit(run), platforms=["tpu", "cuda", "cpu"])(*args)
    assert "tpu_custom_call" in exported.mlir_module()
    np.testing.assert_array_equal(export.deserialize(exported.serialize()).call(*args), run(*args))


def test_kernels_keep_off_arrays_that_xla_may_cut():
    """Catches a kernel where a caller's own jit spreads the arrays over devices with no layout given: XLA cannot cut
    it, and compilation would fail."""
    cache, block = _cache()
    jaxpr = str(jax.make_jaxpr(functools.partial(kv.commit, layout=None))(cache, block, jnp.array([1, 1])))
    assert "pallas_call" not in jaxpr
    there = layout(make_mesh(data=2))
    assert "pallas_call" in str(
        jax.make_jaxpr(functools.partial(kv.commit, layout=there))(cache, block, jnp.array([1, 1]))
    )


def test_on_tpu_maps_only_what_is_mapped():
    """Catches a rule for vmap that takes an unmapped argument for a mapped one."""
    run = on_tpu(lambda x, y: x + y, lambda x, y: x + 2 * y)
    x, y = jnp.arange(3.0), jnp.ones((2, 3))
    np.testing.assert_array_equal(jax.vmap(run, (None, 0))(x, y), x[None] + 2 * y)
    np.testing.assert_array_equal(jax.vmap(run, (0, None))(y, x), y + 2 * x[None])
