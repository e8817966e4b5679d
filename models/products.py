"""Products with weights: one form on TPU and GPU; on CPU, for few rows, the forms that XLA's CPU backend runs fastest.

Reading every weight once is the longest part of a decode step. XLA's CPU product of one row runs on one core, at half
the memory bandwidth. Written as a sum of slices it becomes an ordinary loop: XLA splits the loop over the cores, and
LLVM keeps the activations in registers while it reads the weights. docs/notes/cpu-products-of-few-rows.md says how to
measure this, and lists the forms that were slower.
"""

from __future__ import annotations

import functools
import math
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import Array

_FEW_ROWS = 32
_PADDED_ROWS = 8  # XLA's library works on this many rows at once
_LANES = 16  # LLVM vectorises loops over 16 columns, but not over 8 or 32
_MOST_COLUMNS = 1024  # every 16 columns are a term of the sum, and every term takes time to compile
# A smaller product ends before a second core wakes up, and the weights of narrow models, such as drafts, fit into the
# CPU's cache.
_FEWEST_WEIGHTS = 1 << 17
_FEWEST_COLUMNS = 256


def project(x: Array, weight: Array, *, out_dtype=None) -> Array:
    """x [..., in] times weight [out, in] -> [..., out]."""
    rows = math.prod(x.shape[:-1])
    dtype = out_dtype or x.dtype
    is_in_lanes = 0 < rows <= most_rows_in_lanes() and _fits_lanes(x, weight)

    def plain(x: Array, weight: Array) -> Array:
        return _over_rows(x, weight, 1, dtype)

    def on_cpu(x: Array, weight: Array) -> Array:
        flat = x.reshape(rows, -1)
        out = _in_lanes(flat, weight) if is_in_lanes else _weights_left(flat, weight, dtype)
        return out.astype(dtype).reshape(*x.shape[:-1], -1)

    if is_in_lanes or 1 < rows <= _FEW_ROWS:
        return lax.platform_dependent(x, weight, cpu=on_cpu, default=plain)
    return plain(x, weight)


@functools.cache
def most_rows_in_lanes() -> int:
    """The most rows for which lanes are faster than XLA's library: 4 on AMD (Milan), 1 on Intel (Sapphire Rapids)."""
    file = Path("/proc/cpuinfo")
    return 4 if file.is_file() and "AuthenticAMD" in file.read_text() else 1


def project_in_out(x: Array, weight: Array, *, out_dtype=None) -> Array:
    """x [..., in] times weight [in, out] -> [..., out]."""
    return _over_rows(x, weight, 0, out_dtype or x.dtype)


def materialised(x: Array) -> Array:
    """x [..., n], finite, unchanged but computed once: XLA on CPU would compute it in every loop that reads it."""

    def on_cpu(x: Array) -> Array:
        # XLA never fuses a product into a loop, and this one is exact. An optimization barrier is gone before fusion.
        eye = jnp.eye(x.shape[-1], dtype=x.dtype)
        return lax.dot_general(x, eye, (((x.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)

    return lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x)


def exact_precision(dtype):
    """Full precision for float32: by default TPUs multiply in bfloat16 and GPUs in TF32, which flips greedy ties."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _over_rows(x: Array, weight: Array, axis: int, dtype) -> Array:
    # As [B, T, D], TPUs would pad every row's T to whole tiles, 17 tokens to 32, and multiply the padding too; and XLA
    # would not prefetch weights past an attention kernel. (Nor does it if everything between the products is flat too.)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _contract(flat, weight, (1, axis), dtype).reshape(*x.shape[:-1], weight.shape[1 - axis])


def _contract(left: Array, right: Array, axes: tuple[int, int], dtype) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=exact_precision(left.dtype), preferred_element_type=dtype)


def _weights_left(x: Array, weight: Array, dtype) -> Array:
    # XLA's CPU library repacks the right operand of a product. With the weights there, the repacking costs more than
    # the product itself. On the left the weights are read once, without repacking.
    padded = jnp.pad(x, ((0, -len(x) % _PADDED_ROWS), (0, 0)))
    # The barriers keep both transposes, of a few rows each, out of the product.
    right = lax.optimization_barrier(padded.T)
    return lax.optimization_barrier(_contract(weight, right, (1, 0), dtype))[:, : len(x)].T


def _fits_lanes(x: Array, weight: Array) -> bool:
    columns = weight.shape[1]
    is_in_range = _FEWEST_COLUMNS <= columns <= _MOST_COLUMNS and columns % _LANES == 0
    return is_in_range and weight.size >= _FEWEST_WEIGHTS and x.dtype == weight.dtype == jnp.float32


# Under vmap the slices would read the weights once for each row. So vmap makes all rows those of one product.
@jax.custom_jvp
def _in_lanes(x: Array, weight: Array) -> Array:
    """x [R, in] times weight [out, in] -> [R, out], R at most 4."""
    return _batched_in_lanes(x, weight)


@_in_lanes.defjvp
def _in_lanes_jvp(primals, tangents):
    (x, weight), (x_dot, weight_dot) = primals, tangents
    axes, dtype = (1, 1), jnp.float32
    return _in_lanes(x, weight), _contract(x_dot, weight, axes, dtype) + _contract(x, weight_dot, axes, dtype)


@jax.custom_batching.custom_vmap
def _batched_in_lanes(x: Array, weight: Array) -> Array:
    rows = len(x)
    if rows == 1:
        return _sum_lanes(_sum_of_slices(x, weight)).T
    # Two rows share each read of a weight. A loop has one result, so a complex number holds both.
    half = -(-rows // 2)
    x = jnp.pad(x, ((0, rows % 2), (0, 0)))
    pairs = _sum_lanes(lax.complex(_sum_of_slices(x[:half], weight), _sum_of_slices(x[half:], weight))).T
    return jnp.concatenate([pairs.real, pairs.imag])[:rows]


@_batched_in_lanes.def_vmap
def _batched_in_lanes_vmap(size: int, is_batched: list[bool], x: Array, weight: Array):
    def product(x: Array, weight: Array) -> Array:
        return _contract(x, weight, (x.ndim - 1, 1), jnp.float32)

    if is_batched[1]:
        return jax.vmap(product, (0 if is_batched[0] else None, 0))(x, weight), True
    return product(x, weight), True


@jax.jit  # traced once for all layers: there are up to 64 terms in each of seven products a layer
def _sum_of_slices(x: Array, weight: Array) -> Array:
    """[out, R, lanes]: a weight's row times x, with the columns of every slice summed up."""
    terms = []
    for start in range(0, x.shape[1], _LANES):
        columns = slice(start, start + _LANES)
        terms.append(weight[:, None, columns] * x[None, :, columns])
    return functools.reduce(operator.add, terms)


def _sum_lanes(lanes: Array) -> Array:
    """[out, R, lanes] -> [out, R]."""
    # As a product, which XLA does not fuse. XLA may fuse a sum into the loops that read it, and compute it many times.
    ones = jnp.ones((_LANES,), lanes.dtype)
    flat = lax.dot_general(lanes.reshape(-1, _LANES), ones, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return flat.reshape(lanes.shape[:-1])
