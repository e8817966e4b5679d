"""Pieces that the families share. Parameters are named as in Hugging Face checkpoints: loading is a lookup."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specjax.types import Array

_CPU_ROWS = 8  # products of few rows are padded to a multiple of this on CPU
_CPU_FEW_ROWS = 32

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """y = x W^T + b, with W stored [out, in]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: Array) -> Array:
        y = project(x, self.weight[...])
        return y if self.bias is None else y + along_last(self.bias[...], y)

    def logits(self, x: Array) -> Array:
        """The same in float32, without bias: an output layer."""
        return project(x, self.weight[...], out_dtype=jnp.float32)


class Conv1D(nnx.Module):
    """y = x W + b, with W stored [in, out]."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Array) -> Array:
        y = project_in_out(x, self.weight[...])
        return y + along_last(self.bias[...], y)


class Embedding(nnx.Module):
    """Rows by id; also the output layer of models that tie the two."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs, (count, width)))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.weight[...], ids, axis=0)

    def logits(self, x: Array) -> Array:
        """x [..., width] times every row, float32."""
        return project(x, self.weight[...], out_dtype=jnp.float32)


class Kinds(NamedTuple):
    """The layers that hold matrices: how those are kept is nobody else's business (see int8.py)."""

    linear: Callable[..., Any]
    embedding: Callable[..., Any]
    conv: Callable[..., Any]


PLAIN = Kinds(Linear, Embedding, Conv1D)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, width: int, epsilon: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scaled = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        return scaled.astype(x.dtype) * along_last(self.weight[...], x)


class LayerNorm(nnx.Module):
    """(x - mean) / std * weight + bias over the last axis, in float32."""

    def __init__(self, width: int, epsilon: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        scaled = centred * lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.epsilon)
        return scaled.astype(x.dtype) * along_last(self.weight[...], x) + along_last(self.bias[...], x)


def project(x: Array, weight: Array, *, out_dtype=None) -> Array:
    """x [..., in] times weight [out, in] -> [..., out]."""

    def plain(x: Array, weight: Array) -> Array:
        return _contract(x, weight, (x.ndim - 1, 1), out_dtype or x.dtype)

    def few_rows(x: Array, weight: Array) -> Array:
        # XLA's CPU library repacks the right operand of a product: with the weights there, the packing costs more than
        # the product itself. On the left they are read once, as they lie (benchmarks/LOG.md: 20 to 30% faster).
        rows = x.reshape(-1, x.shape[-1])
        padded = jnp.pad(rows, ((0, -len(rows) % _CPU_ROWS), (0, 0)))
        # The barriers keep both transposes, of a few rows each, out of the product.
        right = lax.optimization_barrier(padded.T)
        out = lax.optimization_barrier(_contract(weight, right, (1, 0), out_dtype or x.dtype))
        return out[:, : len(rows)].T.reshape(*x.shape[:-1], -1)

    if 1 < math.prod(x.shape[:-1]) <= _CPU_FEW_ROWS:
        return lax.platform_dependent(x, weight, cpu=few_rows, default=plain)
    return plain(x, weight)


def project_in_out(x: Array, weight: Array, *, out_dtype=None) -> Array:
    """x [..., in] times weight [in, out] -> [..., out]."""
    return _contract(x, weight, (x.ndim - 1, 0), out_dtype or x.dtype)


def _contract(left: Array, right: Array, axes: tuple[int, int], out_dtype) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(
        left, right, dimensions, precision=exact_precision(left.dtype), preferred_element_type=out_dtype
    )


def exact_precision(dtype):
    """float32 means float32: without this TPUs multiply in bfloat16 and GPUs in TF32, and greedy ties flip."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def along_last(vector: Array, like: Array) -> Array:
    """`vector` [D] with the rank of `like` [..., D]: callers may have set jax_numpy_rank_promotion to "raise"."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def split_heads(x: Array, head_dim: int) -> Array:
    """[B, T, H * D] -> [B, H, T, D]."""
    batch, width, _ = x.shape
    return x.reshape(batch, width, -1, head_dim).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """[B, H, T, D] -> [B, T, H * D]."""
    batch, _, width, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, width, -1)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    return 0.02 * jax.random.normal(rngs.params(), shape)
