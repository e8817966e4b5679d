"""Static key/value buffers: how keys and values are stored, read and written.

A cache is a tuple of [B, Hkv, S, D] buffers per layer with one length per row. A *block* holds the keys and values of
tokens not yet decided on (a prompt chunk, a draft, the K+1 tokens under verification): attention reads the live part
of the cache and the block, and only `commit` writes the cache, once, after the layers. So the cache is read-only
during drafting and verification (nothing to copy, nothing to roll back), drafting writes a small buffer at the same
place for all rows, and a tree needs no more than a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels import attention
from specjax.kernels import write as kernel
from specjax.kernels.attention import Operands
from specjax.kernels.backed import on_tpu
from specjax.sharding import Layout, constrain, on_each
from specjax.types import Array

_MASKED = -1e30  # finite, so that a row with nothing live in one part stays free of NaN
_SMALLEST_BUCKET = 128
_MOST_BUCKETS = 6


class KVCache(NamedTuple):
    """Committed keys and values. Slots past `lengths` hold leftovers; attention never reads them."""

    keys: tuple[Array, ...]  # per layer [B, Hkv, S, D]
    values: tuple[Array, ...]
    lengths: Array  # [B] int32, committed tokens


class KVBlock(NamedTuple):
    """Keys and values of the tokens not yet committed."""

    keys: tuple[Array, ...]  # per layer [B, Hkv, N, D]
    values: tuple[Array, ...]
    positions: Array  # [B, N] int32, position in the text of each slot
    filled: Array  # [] int32, slots in use, the same for all rows


class Placement(NamedTuple):
    """Positions of the T tokens of a forward pass, and the slots that they see; computed once for all layers."""

    positions: Array  # [B, T] int32
    block_positions: Array  # [B, N] int32
    visible: Array  # [B or 1, T, N] bool
    cache_lengths: Array  # [B] int32


def init_cache(
    layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype, layout: Layout | None = None
) -> KVCache:
    """An empty cache. Slots are rounded up to a multiple of 128, which every backend tiles well."""
    shape = (batch, heads, -(-slots // 128) * 128, head_dim)
    # If XLA knew that the lengths are 0, it would constant-fold the masks of every prefix, which takes minutes.
    lengths = lax.optimization_barrier(jnp.zeros((batch,), jnp.int32))
    keys, values = (_zeros(layers, shape, dtype, layout) for _ in range(2))
    return KVCache(keys, values, constrain(layout, lengths, "rows"))


def init_block(
    layers: int, batch: int, heads: int, size: int, head_dim: int, dtype, layout: Layout | None = None
) -> KVBlock:
    """An empty block with room for `size` tokens."""
    shape = (batch, heads, size, head_dim)
    keys, values = (_zeros(layers, shape, dtype, layout) for _ in range(2))
    return KVBlock(keys, values, constrain(layout, jnp.zeros((batch, size), jnp.int32), "rows"), jnp.int32(0))


def place(cache: KVCache, block: KVBlock, width: int, depths: Array | None, visible: Array | None) -> Placement:
    """Positions and block mask of the next `width` tokens; see `types.Apply` for depths and visible."""
    size = block.positions.shape[1]
    order = block.filled + jnp.arange(width)
    if visible is None:
        visible = jnp.arange(size)[None, :] <= order[:, None]
    if visible.ndim == 2:
        visible = visible[None]
    steps = order if depths is None else depths
    positions = cache.lengths[:, None] + (steps[None] if steps.ndim == 1 else steps)
    block_positions = append(block.positions, positions, block.filled, axis=1)
    return Placement(positions, block_positions, visible, cache.lengths)


def append(buffer: Array, new: Array, filled: Array, axis: int = 2) -> Array:
    """`new` written into the block's buffer after the `filled` slots."""
    if new.shape[axis] == buffer.shape[axis]:
        return new  # the block is filled at once: nothing was in it
    return lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), filled, axis)


def attend(
    query: Array,
    cache_keys: Array,
    cache_values: Array,
    block_keys: Array,
    block_values: Array,
    placement: Placement,
    *,
    scale: float,
    window: int | None = None,
    layout: Layout | None = None,
) -> Array:
    """Attention over the live cache and the block, with one softmax over both.

    Args:
      query: [B, Hq, T, D]; Hq is a multiple of Hkv.
      cache_keys, cache_values: [B, Hkv, S, D]; only slots below the row's length are read.
      block_keys, block_values: [B, Hkv, N, D].
      scale: factor on the scores, usually D ** -0.5.
      window: sliding window: a token sees itself and the window - 1 positions before it.
      layout: of rows and heads on a mesh; every device computes attention for its own part.

    Returns:
      [B, Hq, T, D], the query's dtype. The cost follows the longest live row, not S: the work is done at the
      smallest of a few cache prefixes that holds every live slot. On TPU it follows each row's own length.
      A token that is not seen has no influence, even if its keys or values are NaN or infinite; a query that does see
      such a token gives NaN.
    """
    run = functools.partial(_attend, scale=scale, window=window, is_whole=_is_whole(layout))
    roles = ("rows", "heads")
    on_mesh = on_each(layout, run, (("rows", "query"), roles, roles, roles, roles, ("rows",)), ("rows", "query"))
    return on_mesh(query, cache_keys, cache_values, block_keys, block_values, placement)


@functools.partial(jax.jit, static_argnames=("scale", "window", "is_whole"), inline=True)  # traced once for all layers
def _attend(
    query: Array,
    cache_keys: Array,
    cache_values: Array,
    block_keys: Array,
    block_values: Array,
    placement: Placement,
    *,
    scale: float,
    window: int | None,
    is_whole: bool,
) -> Array:
    batch, query_heads, width, head_dim = query.shape
    groups = query_heads // cache_keys.shape[1]
    folded = query.reshape(batch, -1, groups * width, head_dim)
    positions = placement.positions[:, :, None]  # [B, T, 1]
    seen, oldest = placement.visible, None
    if window is not None:
        seen = seen & (positions - placement.block_positions[:, None, :] < window)
        oldest = jnp.tile(positions - window + 1, (1, groups, 1))
    seen = jnp.tile(seen, (1, groups, 1))  # [B or 1, G*T, N]
    block_keys, block_values = _faults_in_keys(block_keys, block_values)

    form = functools.partial(_attend_over_prefix, scale=scale)
    if is_whole and attention.piece_slots(groups * width, cache_keys) is not None:
        form = on_tpu(functools.partial(attention.attend, scale=scale), form)
    given = Operands(folded, cache_keys, cache_values, block_keys, block_values, seen, placement.cache_lengths, oldest)
    return form(given).reshape(query.shape)


def _faults_in_keys(keys: Array, values: Array) -> tuple[Array, Array]:
    """The same keys and values [B, Hkv, N, D], but a token whose values are not finite has keys of NaN and values of 0.

    A mask replaces the score of any key, even NaN. It does not help with values: a weight of 0 times NaN is NaN.
    """
    is_sound = jnp.all(jnp.isfinite(values), -1, keepdims=True)
    return jnp.where(is_sound, keys, jnp.nan), jnp.where(is_sound, values, 0)


def _attend_over_prefix(given: Operands, *, scale: float) -> Array:
    """By XLA, at the smallest of a few cache prefixes that holds every live slot.

    Dead slots may hold NaN, and a weight of 0 times NaN is NaN, so values are masked too. This is free where XLA fuses
    the mask into the product. On CPU XLA would write a masked copy of all values first. There the values are masked
    only if a first try without the mask gives a number that is not finite.
    """
    query, cache_keys, cache_values, block_keys, block_values, seen, lengths, oldest = given
    block_scores = jnp.where(seen[:, None], _dot(query, block_keys, ((3,), (3,))) * scale, _MASKED)
    block_peak = jnp.max(block_scores, -1, keepdims=True)

    def over(size: int, clean: Callable[[Array, Array], Array], cache_keys: Array, cache_values: Array) -> Array:
        if size == 0:
            weights = jnp.exp(block_scores - block_peak)
            return _mix(weights, block_values) / jnp.sum(weights, -1, keepdims=True)
        slot = jnp.arange(size)[None, None]
        is_live = slot < lengths[:, None, None]  # [B, 1, size]
        is_seen = is_live if oldest is None else is_live & (slot >= oldest)
        keys, values = cache_keys[:, :, :size], clean(cache_values[:, :, :size], is_live)
        scores = jnp.where(is_seen[:, None], _dot(query, keys, ((3,), (3,))) * scale, _MASKED)
        peak = jnp.maximum(jnp.max(scores, -1, keepdims=True), block_peak)
        cached, own = jnp.exp(scores - peak), jnp.exp(block_scores - peak)
        total = jnp.sum(cached, -1, keepdims=True) + jnp.sum(own, -1, keepdims=True)
        return (_mix(cached, values) + _mix(own, block_values)) / total

    sizes = _prefix_sizes(cache_keys.shape[2])

    def over_smallest(clean: Callable[[Array, Array], Array], *cache: Array) -> Array:
        chosen = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), jnp.max(lengths), method="compare_all")
        return lax.switch(chosen, [functools.partial(over, size, clean) for size in sizes], *cache)

    def on_cpu(*cache: Array) -> Array:
        out = over_smallest(lambda values, is_live: values, *cache)
        is_sound = jnp.isfinite(out)

        def again(*cache: Array) -> Array:  # finite numbers of the first try stay, to the last bit
            return jnp.where(is_sound, out, over(sizes[-1], _without_dead, *cache))

        return lax.cond(jnp.all(is_sound), lambda *_: out, again, *cache)

    elsewhere = functools.partial(over_smallest, _without_dead)
    return lax.platform_dependent(cache_keys, cache_values, cpu=on_cpu, default=elsewhere).astype(query.dtype)


def _without_dead(values: Array, is_live: Array) -> Array:
    """values [B, Hkv, S, D], 0 in the slots that are not live [B, 1, S]."""
    return jnp.where(is_live[..., None], values, 0)


def commit(
    cache: KVCache, block: KVBlock, keep: Array, path: Array | None = None, *, layout: Layout | None = None
) -> KVCache:
    """The cache with the first `keep` [B] tokens of the block added; along `path` [B, n] (block slots), for a tree.

    The whole block is written after the live part and only `keep` of it counted: the slots past the new length are
    overwritten by the next commit. The cache therefore needs as many spare slots as a block has.
    """
    new = (*block.keys, *block.values)
    if path is not None:
        new = tuple(jnp.take_along_axis(buffer, path[:, None, :, None], 2) for buffer in new)
    roles = ("rows", "heads")
    write = on_each(layout, _write_at_once if _is_whole(layout) else write_rows, (roles, roles, ("rows",)), roles)
    written = write((*cache.keys, *cache.values), new, after(cache.lengths, keep))
    layers = len(cache.keys)
    return KVCache(written[:layers], written[layers:], cache.lengths + keep)


def after(value: Array, witness: Array) -> Array:
    """`value`, but available only after `witness` [B], integers of 0 or more.

    XLA orders operations by data dependence only. If a write to the cache could run before the last read of it, XLA
    would copy the cache first, in every round. So the write gets an input that depends on the reads.
    """
    return jnp.minimum(value, value + witness)


def write_rows(buffers: tuple[Array, ...], new: tuple[Array, ...], starts: Array) -> tuple[Array, ...]:
    """Writes `new[i][b]` into `buffers[i][b]` from slot starts[b] on, along the last axis but one; in place if donated.

    A loop over rows on purpose. A vmapped update becomes a copy on CPU and a scatter or a serial loop on TPU. Unrolled
    updates become copies on CPU if there are more than a few rows, and on TPU they change the layout of the buffers.
    """

    def write_row(row, written: tuple[Array, ...]) -> tuple[Array, ...]:
        def one(buffer: Array, update: Array) -> Array:
            piece = lax.dynamic_slice_in_dim(update, row, 1, 0).astype(buffer.dtype)
            at = (row, *(0,) * (buffer.ndim - 3), starts[row], 0)
            return lax.dynamic_update_slice(buffer, piece, at)

        return tuple(one(buffer, update) for buffer, update in zip(written, new, strict=True))

    return lax.fori_loop(0, starts.shape[0], write_row, buffers)


def _write_at_once(buffers: tuple[Array, ...], new: tuple[Array, ...], starts: Array) -> tuple[Array, ...]:
    """The same, by a kernel if there is one for such arrays; each array lies whole on one device."""
    if all(kernel.is_fit(buffer, update) for buffer, update in zip(buffers, new, strict=True)):
        return on_tpu(kernel.write_rows, write_rows)(buffers, new, starts)
    return write_rows(buffers, new, starts)


def _is_whole(layout: Layout | None) -> bool:
    """Whether an array lies whole on the device that works on it: XLA cannot cut a kernel over several."""
    return layout is not None or jax.device_count() == 1


def _prefix_sizes(slots: int) -> tuple[int, ...]:
    """Cache prefixes to attend over: nothing, then halvings of the whole down to 128 slots, six at most."""
    sizes = [slots]
    while sizes[0] > _SMALLEST_BUCKET and len(sizes) < _MOST_BUCKETS:
        sizes.insert(0, -(-sizes[0] // 256) * 128)
    return (0, *sizes)


def _zeros(layers: int, shape: tuple[int, ...], dtype, layout: Layout | None) -> tuple[Array, ...]:
    return tuple(constrain(layout, jnp.zeros(shape, dtype), "rows", "heads") for _ in range(layers))


def _mix(weights: Array, values: Array) -> Array:
    return _dot(weights.astype(values.dtype), values, ((3,), (2,)))


def _dot(left: Array, right: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    # float32 callers asked for float32: without a precision TPU and GPU would multiply in bfloat16 or TF32.
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left, right, (contract, ((0, 1), (0, 1))), precision=precision, preferred_element_type=jnp.float32
    )
