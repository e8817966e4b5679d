"""The cache write on TPU: few kernels write the new slots of all buffers, in place; all copies of a row run together.

XLA's loop over rows does a slice and an update for each buffer, one after the other; each takes far longer than moving
its few kilobytes (docs/notes/tpu-estimates-leave-out-prefetched-weights.md). Here the kernel fetches the aligned window
around a row's new slots from each buffer, overwrites it with the new keys or values, and sends it back. While it works
on one window, the others are being copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from specjax.types import Array

_MOST_TOKENS = 17  # K = 16; every token is a step of the kernel, so prompts are left to XLA
_MOST_BUFFERS = 32  # of one kernel
_MOST_BYTES = 8 * 2**20  # of on-chip memory, half of what a kernel may take
_LANES = 128  # columns of a tile
_TILE_BYTES = 32  # of a tile's column: 8 rows of float32, 16 of bfloat16


class _Kind(NamedTuple):
    """What the buffers of one model have in common, as the kernel sees them."""

    slots_last: bool  # narrow heads: XLA keeps them as [B, H, D, S], so that no lane is idle
    tile: int  # slots; copies start and end on whole tiles
    window: int  # slots, enough for all new ones wherever they start

    def shape(self, head_dim: int) -> tuple[int, int]:
        """The shape of one head's window."""
        return (head_dim, self.window) if self.slots_last else (self.window, head_dim)


def is_fit(buffer: Array, new: Array) -> bool:
    """Whether the kernel can write `new` [B, H, N, D] into `buffer` [B, H, S, D]."""
    slots, head_dim = buffer.shape[2:]
    tokens = new.shape[2]
    if not 1 <= tokens <= _MOST_TOKENS or buffer.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    kind = _kind(buffer, tokens)
    # XLA may lay out heads of other widths differently: a kernel would make it copy the whole cache.
    is_laid_out_so = head_dim == _LANES // 2 or head_dim % _LANES == 0
    return (
        is_laid_out_so
        and _bytes(kind, buffer, tokens) <= _MOST_BYTES
        and slots % kind.tile == 0
        and slots >= kind.window
    )


def write_rows(
    buffers: Sequence[Array], new: Sequence[Array], starts: Array, *, interpret: object = False
) -> tuple[Array, ...]:
    """The buffers with new[i][b] written into buffers[i][b] from slot starts[b] on, or from the last one with room.

    Args:
      buffers: [B, H, S, D] each, all alike; in place where XLA may reuse them.
      new: [B, H, N, D] each, for which `is_fit` holds.
      starts: [B] int32, from 0 on.
      interpret: what `pallas_call` takes, for tests without a TPU.
    """
    tokens = new[0].shape[2]
    kind = _kind(buffers[0], tokens)
    count = min(_MOST_BUFFERS, _MOST_BYTES // _bytes(kind, buffers[0], tokens))
    starts = jnp.minimum(starts, buffers[0].shape[2] - tokens)
    # In the axis orders that XLA uses: with others, XLA would copy the buffers of every layer.
    new = [update.astype(buffers[0].dtype) for update in new]
    if kind.slots_last:
        buffers, new = ([array.swapaxes(2, 3) for array in arrays] for arrays in (buffers, new))
    else:
        new = [update.swapaxes(1, 2) for update in new]
    written: list[Array] = []
    for first in range(0, len(buffers), count):
        some = slice(first, first + count)
        written += _call(kind, buffers[some], new[some], starts, interpret)
    return tuple(out.swapaxes(2, 3) if kind.slots_last else out for out in written)


def _kind(buffer: Array, tokens: int) -> _Kind:
    slots_last = buffer.shape[3] < _LANES
    tile = _LANES if slots_last else _TILE_BYTES // buffer.dtype.itemsize
    return _Kind(slots_last, tile, (-(-(tokens - 1) // tile) + 1) * tile)


def _bytes(kind: _Kind, buffer: Array, tokens: int) -> int:
    """On-chip bytes of one buffer: a window, and the new slots of two turns, padded to tiles."""
    heads, head_dim, size = buffer.shape[1], buffer.shape[3], buffer.dtype.itemsize
    sublanes = _TILE_BYTES // size
    new = heads * head_dim * _LANES if kind.slots_last else tokens * -(-heads // sublanes) * sublanes * head_dim
    return (heads * kind.window * head_dim + 2 * new) * size


def _call(
    kind: _Kind, buffers: Sequence[Array], new: Sequence[Array], starts: Array, interpret: object
) -> Sequence[Array]:
    """buffers [B, H, S, D] and new [B, N, H, D]; with the slots last [B, H, D, S] and [B, H, D, N]."""
    count, dtype = len(buffers), buffers[0].dtype
    batch, heads = buffers[0].shape[:2]
    axis = 3 if kind.slots_last else 2
    slots, head_dim = buffers[0].shape[axis], buffers[0].shape[5 - axis]
    tokens = new[0].shape[3 if kind.slots_last else 1]
    windows_shape = (heads, *kind.shape(head_dim))

    def kernel(starts, *refs):
        new_refs, old, out = refs[:count], refs[count : 2 * count], refs[2 * count : 3 * count]
        windows, fetched, sent = refs[3 * count :]
        row = pl.program_id(0)
        start = starts[row]
        # A mask, not a division: lowering a division asks which TPU is present, and for jax.export there is none.
        base = pl.multiple_of(jnp.minimum(start & -kind.tile, slots - kind.window), kind.tile)
        place = base + lax.broadcasted_iota(jnp.int32, windows_shape, axis - 1) - start

        def window_of(ref):
            here = pl.ds(base, kind.window)
            return ref.at[row, :, :, here] if kind.slots_last else ref.at[row, :, here]

        def fetch(index: int):
            return pltpu.make_async_copy(window_of(old[index]), windows.at[index], fetched.at[index])

        def send(index: int):
            return pltpu.make_async_copy(windows.at[index], window_of(out[index]), sent.at[index])

        def token_of(index: int, token: int) -> Array:
            ref = new_refs[index]
            return ref[0, :, :, token : token + 1] if kind.slots_last else ref[0, token][:, None]

        for index in range(count):
            fetch(index).start()
        for index in range(count):
            fetch(index).wait()
            laid = windows[index]
            for token in range(tokens):
                laid = jnp.where(place == token, token_of(index, token), laid)
            windows[index] = laid
            send(index).start()
        # The next row's windows use the same memory.
        for index in range(count):
            send(index).wait()

    bytes_accessed = 2 * count * batch * heads * kind.window * head_dim * dtype.itemsize
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    of_row = pl.BlockSpec((1, *new[0].shape[1:]), lambda row, starts: (row, 0, 0, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[of_row] * count + [anywhere] * count,
            out_specs=[anywhere] * count,
            scratch_shapes=[
                pltpu.VMEM((count, *windows_shape), dtype),
                pltpu.SemaphoreType.DMA((count,)),
                pltpu.SemaphoreType.DMA((count,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(buffer.shape, dtype) for buffer in buffers],
        input_output_aliases={1 + count + index: index for index in range(count)},
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=bytes_accessed),
        interpret=interpret,
    )(starts, *new, *buffers)
