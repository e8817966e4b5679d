"""Attention on TPU: a few queries a row over the live part of the cache; the rest of the cache is not read.

XLA's form works on a prefix that holds the longest row, and prefetches whole caches nevertheless. Here a list of (row,
piece of the cache) names the live pieces, and the grid is as long as that list: the cost of a row follows its own
length. The softmax is a running peak and sum (FlashAttention, arXiv:2205.14135, algorithm 1), which begin with the
block's own keys: unlike there, they are finite from the start.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from specjax.types import Array

NAME = "attention"  # in compiled programs
_MASKED = -1e30
_LANES = 128
_PIECES = (1024, 512, 256, 128)
_PIECE_BYTES = 1 << 19  # of keys and values; at 819 GB/s (v5e) 0.6 us, about the fixed cost of a turn of the grid
_SCORE_BYTES = 1 << 20


def piece_slots(queries: int, keys: Array) -> int | None:
    """Slots of a piece for this number of queries of each key head; None if the kernel does not support them.

    Narrow heads are left to XLA. Their models are small, and XLA prefetches weights during its own attention but not
    during a kernel (docs/notes/tpu-estimates-leave-out-prefetched-weights.md).
    """
    heads, slots, head_dim = keys.shape[1:]
    if keys.dtype not in (jnp.float32, jnp.bfloat16) or slots % _LANES or head_dim % _LANES:
        return None
    for size in _PIECES:
        piece_bytes = 2 * heads * size * head_dim * keys.dtype.itemsize
        if size <= slots and piece_bytes <= _PIECE_BYTES and 4 * heads * queries * size <= _SCORE_BYTES:
            return size
    return None


class Operands(NamedTuple):
    """The inputs of attention, with the queries of each key head in one axis; for the kernel and for XLA's form."""

    query: Array  # [B, Hkv, Q, D]
    cache_keys: Array  # [B, Hkv, S, D]
    cache_values: Array
    block_keys: Array  # [B, Hkv, N, D]
    block_values: Array
    seen: Array  # [B or 1, Q, N] bool, block slots that each query sees
    lengths: Array  # [B] int32, live slots of the cache
    oldest: Array | None  # [B, Q, 1] int32, the first slot that a query sees; None: the first of all


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend(given: Operands, *, scale: float, interpret: object = False) -> Array:
    """One softmax over cache and block; [B, Hkv, Q, D], the query's dtype.

    Args:
      given: operands for which `piece_slots` is not None.
      scale: factor on the scores.
      interpret: what `pallas_call` takes, for tests without a TPU.
    """
    query, cache_keys, cache_values, block_keys, block_values, seen, lengths, oldest = given
    batch, heads, queries, head_dim = query.shape
    slots = cache_keys.shape[2]
    size = piece_slots(queries, cache_keys)
    assert size is not None
    first = jnp.zeros_like(lengths) if oldest is None else jnp.maximum(jnp.min(oldest, (1, 2)), 0)
    rows, pieces, count = _live(first, lengths, slots, size)

    def of_row(array: Array) -> pl.BlockSpec:
        inner = array.shape[1:]
        if len(array) < batch:  # one for all rows
            return pl.BlockSpec((1, *inner), lambda *_: (0,) * array.ndim)
        return pl.BlockSpec((1, *inner), lambda step, rows, *_: (rows[step], *(0,) * len(inner)))

    piece = pl.BlockSpec((1, heads, size, head_dim), lambda step, rows, pieces, _: (rows[step], 0, pieces[step], 0))
    # Otherwise XLA may prefetch a whole cache into on-chip memory before the kernel.
    cached = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in (cache_keys, cache_values)]
    small = (query, block_keys, block_values, seen.astype(jnp.int32), *(() if oldest is None else (oldest,)))
    products = batch * heads * queries * slots
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, size=size, windowed=oldest is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(count,),
            in_specs=[*map(of_row, small), piece, piece],
            out_specs=of_row(query),
            scratch_shapes=[
                pltpu.VMEM((heads, queries, 1), jnp.float32),
                pltpu.VMEM((heads, queries, 1), jnp.float32),
                pltpu.VMEM((heads, queries, head_dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        cost_estimate=pl.CostEstimate(
            flops=4 * products * head_dim,
            transcendentals=products,
            bytes_accessed=2 * cache_keys.size * cache_keys.dtype.itemsize,
        ),
        interpret=interpret,
        name=NAME,
    )(rows, pieces, lengths, *small, *cached)


def _live(first: Array, lengths: Array, slots: int, size: int) -> tuple[Array, Array, Array]:
    """(row of each live piece, index of the piece in its row, number of pieces). Every row has at least one.

    The lists have their maximal length plus one. Past the last piece they hold a row number that no row has.
    """
    most = -(-slots // size)
    begin = jnp.minimum(first, lengths) // size
    count = jnp.maximum(-(-lengths // size) - begin, 1)
    # Sums over a few rows fuse into one or two operations; of a cumsum and lookups XLA makes a chain of small ones.
    row = jnp.arange(len(lengths))
    ends = jnp.sum(jnp.where(row[:, None] >= row[None, :], count[None, :], 0), 1)
    steps = jnp.arange(len(lengths) * most + 1)
    rows = jnp.sum(steps[:, None] >= ends[None, :], 1)
    offsets = begin - (ends - count)
    pieces = steps + jnp.sum(jnp.where(rows[:, None] == row[None, :], offsets[None, :], 0), 1)
    return rows, jnp.clip(pieces, 0, most - 1), ends[-1]


def _kernel(rows, pieces, lengths, query, block_keys, block_values, seen, *refs, scale, size, windowed):
    oldest = refs[0] if windowed else None
    keys, values, out, peak, total, mixed = refs[windowed:]
    step = pl.program_id(0)
    row = rows[step]

    @pl.when((step == 0) | (rows[jnp.maximum(step - 1, 0)] != row))
    def begin():
        scores = jnp.where(seen[...] != 0, _dot(query[0], block_keys[0], 2) * scale, _MASKED)
        peak[...] = jnp.max(scores, 2, keepdims=True)
        weights = jnp.exp(scores - peak[...])
        total[...] = jnp.sum(weights, 2, keepdims=True)
        mixed[...] = _dot(weights.astype(values.dtype), block_values[0], 1)

    start = pieces[step] * size
    live = lengths[row] - start
    scores = _dot(query[0], keys[0], 2) * scale
    slot = lax.broadcasted_iota(jnp.int32, (1, *scores.shape[1:]), 2)
    visible = slot < live
    if oldest is not None:
        visible = visible & (slot >= oldest[...] - start)
    scores = jnp.where(visible, scores, _MASKED)
    before = peak[...]
    now = jnp.maximum(before, jnp.max(scores, 2, keepdims=True))
    fade, weights = jnp.exp(before - now), jnp.exp(scores - now)
    peak[...] = now
    total[...] = total[...] * fade + jnp.sum(weights, 2, keepdims=True)
    # Dead slots may hold NaN, and so may on-chip memory past the cache's end: NaN times 0 is NaN.
    is_live = lax.broadcasted_iota(jnp.int32, values.shape[1:], 1) < live
    clean = jnp.where(is_live, values[0], jnp.zeros((), values.dtype))
    mixed[...] = mixed[...] * fade + _dot(weights.astype(values.dtype), clean, 1)

    @pl.when(rows[step + 1] != row)
    def finish():
        out[0] = (mixed[...] / total[...]).astype(out.dtype)


def _dot(left: Array, right: Array, axis: int) -> Array:
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left, right, (((2,), (axis,)), ((0,), (0,))), precision=precision, preferred_element_type=jnp.float32
    )
