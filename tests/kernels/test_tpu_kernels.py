"""Kernels for TPU against NumPy, interpreted on CPU, and everything that they must not stand in the way of."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu
from reference import attention as attention_of_a_head

from specjax import cache as kv
from specjax.kernels import attention, write
from specjax.kernels.backed import on_tpu
from specjax.sharding import layout, make_mesh

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


@pytest.mark.parametrize("forgotten", [0, 2])
def test_control_of_a_copy_not_waited_for(forgotten, monkeypatch, capfd):
    """Catches an interpreter that copies at once and sees no race: then the test above would prove nothing of waits."""
    made, real = [], pltpu.make_async_copy

    def forgetful(source, target, semaphore):
        copy = real(source, target, semaphore)
        made.append(copy)
        return types.SimpleNamespace(start=copy.start, wait=(lambda: None) if len(made) == forgotten + 2 else copy.wait)

    monkeypatch.setattr(write.pltpu, "make_async_copy", forgetful)
    buffers, new = _arrays(1, 5)
    run = functools.partial(write.write_rows, interpret=pltpu.InterpretParams(detect_races=True))
    (got,) = jax.jit(run)(buffers, new, jnp.array([0, 31, 124, 255]))
    wanted = _written(np.asarray(buffers[0]), np.asarray(new[0]), [0, 31, 124, 255])
    assert "RACE" in "".join(capfd.readouterr()) or not np.array_equal(got, wanted)


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
    assert "tpu_kernel" not in jaxpr
    there = layout(make_mesh(data=2))
    assert "tpu_kernel" in str(
        jax.make_jaxpr(functools.partial(kv.commit, layout=there))(cache, block, jnp.array([1, 1]))
    )


def test_a_kernel_is_traced_for_tpu_only(alone, monkeypatch):
    """Catches seconds of tracing on machines that will never run a kernel."""
    monkeypatch.setattr(kv.kernel, "write_rows", lambda *args: pytest.fail("traced"))
    cache, block = _cache()
    jax.jit(lambda *args: kv.commit(*args)).trace(cache, block, jnp.array([1, 1])).lower(lowering_platforms=("cpu",))


def test_on_tpu_maps_only_what_is_mapped():
    """Catches a rule for vmap that takes an unmapped argument for a mapped one."""
    run = on_tpu(lambda x, y: x + y, lambda x, y: x + 2 * y)
    x, y = jnp.arange(3.0), jnp.ones((2, 3))
    np.testing.assert_array_equal(jax.vmap(run, (None, 0))(x, y), x[None] + 2 * y)
    np.testing.assert_array_equal(jax.vmap(run, (0, None))(y, x), y + 2 * x[None])


SIMULATED = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")
HEADS = 2


def _normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


TREE = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], bool)
DEPTHS = np.array([0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("dtype", "dim", "groups", "width", "window", "lengths"),
    [
        (jnp.bfloat16, 128, 4, 5, None, [0, 1, 512, 513, 1019]),
        (jnp.float32, 128, 1, 1, None, [128, 256, 257, 0]),
        (jnp.bfloat16, 256, 2, 17, None, [1007, 16, 1000]),
        (jnp.float32, 128, 3, 6, 7, [511, 512, 518, 1018, 3]),  # the window begins before, at and after a piece's end
        (jnp.bfloat16, 128, 2, 3, 600, [0, 600, 1021]),
        (jnp.float32, 128, 2, 5, "tree", [0, 255, 700]),
        (jnp.float32, 128, 2, 5, "tree, window 4", [0, 255, 700]),
    ],
)
def test_attention_reads_what_is_live(dtype, dim, groups, width, window, lengths, capfd):
    """Catches a dead slot that shows (all hold NaN, keys and values), a live one left out at a piece's edge, a row that
    takes a neighbour's piece, a mask read for the wrong query, a window off by one, heads of a group mixed up. The
    block's last token, which only it sees itself, has values that are NaN."""
    batch, slots, depths, visible = len(lengths), 1024 + 128, None, None
    if isinstance(window, str):
        depths, visible = jnp.array(DEPTHS, jnp.int32), jnp.array(TREE)
        window = 4 if "window" in window else None
    live = jnp.arange(slots)[None] < jnp.array(lengths)[:, None]
    keys, values = (
        jnp.where(live[:, None, :, None], _normal(seed, batch, HEADS, slots, dim, dtype=dtype), jnp.nan).astype(dtype)
        for seed in (1, 2)
    )
    own_keys, own_values = (_normal(seed, batch, HEADS, width, dim, dtype=dtype) for seed in (3, 4))
    sound = max(width - 1, 1)  # queries that see nothing but numbers; of one token, that token
    poisoned = own_values.at[:, :, sound:].set(jnp.nan)
    query = _normal(5, batch, HEADS * groups, width, dim, dtype=dtype)
    cache = kv.KVCache((keys,), (values,), jnp.array(lengths, jnp.int32))
    block = kv.init_block(1, batch, HEADS, width, dim, dtype)
    place = kv.place(cache, block, width, depths, visible)
    assert attention.piece_slots(groups * width, keys) is not None

    simulated = functools.partial(attention.attend, interpret=SIMULATED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "on_tpu", lambda kernel, plain: functools.partial(simulated, **kernel.keywords))
        out = kv.attend(
            query, keys, values, own_keys, poisoned, place, scale=0.2, window=window, layout=layout(make_mesh())
        )
    assert jnp.isnan(out[:, :, sound:]).all()
    assert "RACE" not in "".join(capfd.readouterr())
    seen = np.tril(np.ones((width, width), bool)) if visible is None else TREE
    for row, length in enumerate(lengths):
        own_places = length + (np.arange(width) if depths is None else DEPTHS)
        places = np.concatenate([np.arange(length), own_places])[None]
        near = own_places[:, None] - places < (window or 10**9)
        for head in range(HEADS * groups):
            group = head // groups
            all_keys = np.concatenate([keys[row, group, :length], own_keys[row, group]])
            all_values = np.concatenate([values[row, group, :length], own_values[row, group]])
            mask = np.concatenate([np.ones((width, length), bool), seen], 1) & near
            wanted = attention_of_a_head(query[row, head], all_keys, all_values, mask, 0.2)
            atol = 2e-5 if dtype == jnp.float32 else 2e-2
            np.testing.assert_allclose(out[row, head, :sound], wanted[:sound], atol=atol)


def test_a_row_is_what_it_is_alone():
    """Catches a result that depends on the neighbours' lengths: a row's distribution must not depend on its batch."""
    lengths = jnp.array([700, 0, 130], jnp.int32)
    keys, values = (_normal(seed, 3, HEADS, 1024, 128) for seed in (1, 2))
    query, own_keys, own_values = (_normal(seed, 3, HEADS, 2, 128) for seed in (3, 4, 5))
    seen = jnp.tril(jnp.ones((1, 2, 2), bool))

    def run(rows):
        parts = (part[rows] for part in (query, keys, values, own_keys, own_values))
        given = attention.Operands(*parts, seen, lengths[rows], None)
        return attention.attend(given, scale=0.1, interpret=SIMULATED)

    together = run(np.arange(3))
    for row in range(3):
        np.testing.assert_array_equal(run(np.array([row]))[0], together[row])


@pytest.mark.parametrize(
    ("queries", "heads", "dim", "dtype", "slots", "piece"),
    [
        (20, 2, 128, jnp.bfloat16, 4224, 512),
        (20, 1, 128, jnp.bfloat16, 4224, 1024),
        (132, 2, 128, jnp.bfloat16, 4224, 512),  # K = 32
        (160, 8, 128, jnp.bfloat16, 4224, 128),
        (4, 2, 128, jnp.float32, 128, 128),
        (2048, 2, 128, jnp.bfloat16, 4224, None),  # a prompt chunk
        (4, 2, 64, jnp.bfloat16, 4224, None),
        (4, 2, 192, jnp.bfloat16, 4224, None),
        (4, 2, 128, jnp.float16, 4224, None),
        (4, 2, 128, jnp.bfloat16, 4200, None),
    ],
)
def test_what_attention_takes(queries, heads, dim, dtype, slots, piece):
    """Catches a kernel asked for what it cannot do, or for more than a chip has room for: it fails on TPUs only."""
    assert attention.piece_slots(queries, jax.ShapeDtypeStruct((8, heads, slots, dim), dtype)) == piece


def _attended(keys, values, new, lengths, *, layout=None, scale=0.1):
    cache = kv.KVCache((keys,), (values,), lengths)
    place = kv.place(cache, kv.init_block(1, *new.shape, new.dtype), new.shape[2], None, None)
    return kv.attend(new, keys, values, new, new, place, scale=scale, window=100, layout=layout)


def _parts(*stack):
    shapes = ((2, HEADS, 256, 128), (2, HEADS, 256, 128), (2, HEADS, 3, 128))
    arrays = [_normal(seed, *stack, *shape) for seed, shape in enumerate(shapes)]
    return *arrays, jnp.broadcast_to(jnp.array([5, 250], jnp.int32), (*stack, 2))


def _kernels(run, *args) -> int:
    return jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")


def test_where_attention_is_a_kernel():
    """Catches a kernel that XLA would have to cut (it refuses to), one under vmap or in a derivative, and none where
    one should be."""
    here = functools.partial(_attended, layout=layout(make_mesh()))
    assert _kernels(here, *_parts()) == 1
    assert _kernels(functools.partial(_attended, layout=layout(make_mesh(data=2, model=2))), *_parts()) == 1
    assert _kernels(_attended, *_parts()) == 0  # no layout, several devices
    assert _kernels(jax.vmap(here), *_parts(2)) == 0
    assert _kernels(jax.grad(lambda *args: here(*args).sum()), *_parts()) == 0


def test_kernels_can_be_turned_off(monkeypatch):
    """Catches a switch that is read too late, or by one of the two kernels only: the way out where they fail."""
    monkeypatch.setenv("SPECJAX_TPU_KERNELS", "0")
    (cache, block), keep = _cache(), jnp.array([2, 0])
    there = layout(make_mesh())
    # Another scale than elsewhere, hence traced here: the switch counts when a program is traced.
    assert _kernels(functools.partial(_attended, layout=there, scale=0.11), *_parts()) == 0
    assert _kernels(functools.partial(kv.commit, layout=there), cache, block, keep) == 0
    monkeypatch.undo()
    assert _kernels(functools.partial(_attended, layout=there, scale=0.12), *_parts()) == 1
    assert _kernels(functools.partial(kv.commit, layout=there), cache, block, keep) == 1


def test_attention_that_may_be_a_kernel_can_be_mapped_and_differentiated():
    """Catches a rule that hands tangents, cotangents or batch axes to the wrong argument."""
    *arrays, lengths = _parts()

    def of(layout):
        run = functools.partial(_attended, layout=layout)
        gradient = jax.grad(lambda *args: jnp.sum(run(*args, lengths) ** 2), argnums=(0, 1, 2))(*arrays)
        _, tangent = jax.jvp(lambda *args: run(*args, lengths), arrays, arrays)
        keys, values, new, _ = _parts(2)
        return gradient, tangent, jax.vmap(run, (None, 0, 0, None))(arrays[0], values, new, lengths), keys

    found, wanted = jax.jit(lambda: of(layout(make_mesh())))(), jax.jit(lambda: of(None))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)
