"""Attention over cache and block, and commits, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attention

from specjax import cache as kv

BATCH, HEADS, GROUPS, DIM = 3, 2, 3, 8


attend = jax.jit(kv.attend, static_argnames=("scale", "window"))


def _filled(slots, lengths, size, count):
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (BATCH, HEADS, -(-slots // 128) * 128, DIM)
    small = (BATCH, HEADS, size, DIM)
    cache = kv.KVCache(
        (jax.random.normal(keys[0], shape),), (jax.random.normal(keys[1], shape),), jnp.asarray(lengths, jnp.int32)
    )
    block = kv.init_block(1, BATCH, HEADS, size, DIM, jnp.float32)
    before = kv.place(cache, block, count, None, None) if count else None
    block = kv.KVBlock(
        (jax.random.normal(keys[2], small),), (jax.random.normal(keys[3], small),),
        before.block_positions if before else block.positions, jnp.int32(count),
    )  # fmt: skip
    return cache, block, keys[4]


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize(("slots", "lengths"), [(100, [0, 7, 90]), (700, [1, 300, 690]), (128, [0, 0, 0])])
@pytest.mark.parametrize(("width", "count"), [(1, 0), (4, 0), (2, 3)])
def test_attend_matches_numpy(window, slots, lengths, width, count):
    """Catches: dead slots attended to, a live slot past the chosen prefix left out, a window off by one, grouped heads
    mixed up, block slots of the future seen, drafted tokens not seeing each other."""
    size = count + width
    cache, block, key = _filled(slots, lengths, size, count)
    place = kv.place(cache, block, width, None, None)
    query = jax.random.normal(key, (BATCH, HEADS * GROUPS, width, DIM))
    out = attend(query, cache.keys[0], cache.values[0], block.keys[0], block.values[0], place, scale=0.3, window=window)
    for row in range(BATCH):
        live = lengths[row]
        position = live + np.arange(size)
        for head in range(HEADS * GROUPS):
            group = head // GROUPS
            keys = np.concatenate([cache.keys[0][row, group, :live], block.keys[0][row, group]])
            values = np.concatenate([cache.values[0][row, group, :live], block.values[0][row, group]])
            own = position[count:, None]
            other = np.concatenate([np.arange(live), position])[None]
            seen = (other <= own) & (own - other < (window or 10**9))
            wanted = attention(query[row, head], keys, values, seen, 0.3)
            np.testing.assert_allclose(out[row, head], wanted, atol=2e-5)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, -jnp.inf, 1e9, -1e9])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_what_is_masked_may_hold_anything(part, poison):
    """Catches attention that reads rejected drafts: what is past the live length, or not seen in the block, must not
    show, be it NaN or infinite (0 times either is NaN). Here the block's third token is poison: the first two tokens
    cannot see it, the third and fourth can."""
    cache, block, key = _filled(256, [0, 5, 200], 4, 0)
    place = kv.place(cache, block, 4, None, None)
    query = jax.random.normal(key, (BATCH, HEADS, 4, DIM))
    dead = jnp.arange(256)[None, None, :, None] >= cache.lengths[:, None, None, None]
    is_poison = jnp.arange(4)[None, None, :, None] == 2

    def run(cache, block):
        return attend(query, cache.keys[0], cache.values[0], block.keys[0], block.values[0], place, scale=1.0)

    clean = run(cache, block)
    in_cache = cache._replace(**{part: (jnp.where(dead, poison, getattr(cache, part)[0]),)})
    np.testing.assert_array_equal(run(in_cache, block), clean)
    in_block = block._replace(**{part: (jnp.where(is_poison, poison, getattr(block, part)[0]),)})
    out = run(in_cache, in_block)
    np.testing.assert_array_equal(out[:, :, :2], clean[:, :, :2])
    if not jnp.isfinite(poison):
        assert not jnp.isfinite(out[:, :, 2:]).any()


def test_commit_keeps_what_was_accepted():
    """Known bug 5: lengths must count verified tokens only; and a row's write must not touch another row."""
    cache, block, _ = _filled(128, [3, 0, 50], 4, 4)
    after = kv.commit(cache, block, jnp.array([2, 0, 4]))
    assert after.lengths.tolist() == [5, 0, 54]
    for row, (start, keep) in enumerate([(3, 2), (0, 0), (50, 4)]):
        np.testing.assert_array_equal(after.keys[0][row, :, :start], cache.keys[0][row, :, :start])
        np.testing.assert_array_equal(after.keys[0][row, :, start : start + keep], block.keys[0][row, :, :keep])
        np.testing.assert_array_equal(after.values[0][row, :, start : start + keep], block.values[0][row, :, :keep])


def test_commit_along_a_path():
    """Catches a tree commit that keeps a prefix instead of the accepted branch."""
    cache, block, _ = _filled(128, [3, 0, 50], 4, 4)
    path = jnp.array([[0, 2, 3], [0, 1, 3], [0, 3, 1]])
    after = kv.commit(cache, block, jnp.array([3, 2, 2]), path)
    for row, start, chosen in [(0, 3, [0, 2, 3]), (1, 0, [0, 1]), (2, 50, [0, 3])]:
        written = after.keys[0][row, :, start : start + len(chosen)]
        np.testing.assert_array_equal(written, block.keys[0][row, :, jnp.array(chosen)].swapaxes(0, 1))


@pytest.mark.parametrize("batch", [2, 20])
def test_rows_are_written_where_they_start(batch):
    """Catches the loop over many rows and the unrolled one going different ways."""
    starts = (jnp.arange(batch) * 7) % 20
    new = jnp.arange(1.0, batch * 3 + 1).reshape(batch, 1, 3, 1)
    (out,) = kv.write_rows((jnp.zeros((batch, 1, 32, 1)),), (new,), starts)
    for row in range(batch):
        wanted = np.zeros(32)
        wanted[int(starts[row]) :][:3] = new[row, 0, :, 0]
        np.testing.assert_array_equal(out[row, 0, :, 0], wanted)
