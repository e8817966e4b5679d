"""Pieces that the families share. Parameters are named as in Hugging Face checkpoints: loading is a lookup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specjax.models.products import project, project_in_out
from specjax.types import Array

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
    """The layers that hold matrices. Only these layers know how matrices are stored (see int8.py)."""

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
