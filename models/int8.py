"""Matrices kept as int8: whole numbers times one scale for each output. Half the bytes of bfloat16.

Source: round to nearest, scaled by the largest absolute value: Dettmers et al., arXiv:2208.07339, section 2. Unlike
there, activations keep their dtype, and outliers are not treated separately. `qwix` cannot be used here: its provider
writes into the module while it is traced, which Flax refuses inside `lax.platform_dependent`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models.family import Architecture, assemble, tensor_name
from specjax.models.layers import Kinds, along_last
from specjax.models.products import project, project_in_out
from specjax.types import Array, PyTree

_LARGEST = 127


class Int8Linear(nnx.Module):
    """y = scale * (x W^T) + b, with W [out, in] int8 and one scale for each output."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        del rngs  # made from trained weights, not at random
        self.weight = nnx.Param(jnp.zeros((outputs, inputs), jnp.int8))
        self.scale = nnx.Param(jnp.ones((outputs, 1)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x: Array) -> Array:
        y = _scaled(project(x, self.weight[...].astype(x.dtype), out_dtype=jnp.float32), self.scale[...])
        y = y.astype(x.dtype)
        return y if self.bias is None else y + along_last(self.bias[...], y)

    def logits(self, x: Array) -> Array:
        """The same in float32, for an output layer."""
        return _scaled(project(x, self.weight[...].astype(x.dtype), out_dtype=jnp.float32), self.scale[...])


class Int8Embedding(nnx.Module):
    """Rows by id, with one scale for each; also the output layer of models that tie the two."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        del rngs
        self.weight = nnx.Param(jnp.zeros((count, width), jnp.int8))
        self.scale = nnx.Param(jnp.ones((count, 1)))

    def __call__(self, ids: Array) -> Array:
        scale = jnp.take(self.scale[...], ids, axis=0)
        return jnp.take(self.weight[...], ids, axis=0).astype(scale.dtype) * scale

    def logits(self, x: Array) -> Array:
        """x [..., width] against every row, float32."""
        return _scaled(project(x, self.weight[...].astype(x.dtype), out_dtype=jnp.float32), self.scale[...])


class Int8Conv1D(nnx.Module):
    """y = scale * (x W) + b, with W [in, out] int8 and one scale for each output."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        del rngs
        self.weight = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8))
        self.scale = nnx.Param(jnp.ones((1, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Array) -> Array:
        y = project_in_out(x, self.weight[...].astype(x.dtype), out_dtype=jnp.float32)
        y = _scaled(y, self.scale[...]).astype(x.dtype)
        return y + along_last(self.bias[...], y)


INT8 = Kinds(Int8Linear, Int8Embedding, Int8Conv1D)


def rounded_params(built: Architecture, params: PyTree) -> PyTree:
    """The parameters of `built`, whose matrices are int8, made from those of the model before quantisation."""
    given = {tensor_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wanted = {tensor_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(built.abstract)}

    def make(name: str, place: jax.sharding.Sharding | None) -> Array:
        layer, _, own = name.rpartition(".")
        scale = wanted.get(f"{layer}.scale")
        if scale is None or own == "bias":
            return given[name]
        rounded = functools.partial(round_matrix, axis=scale.index(1))
        return jax.jit(lambda weight: getattr(rounded(weight), own), out_shardings=place)(given[f"{layer}.weight"])

    return assemble(built, make)


class Rounded(NamedTuple):
    """A matrix is about weight * scale."""

    weight: Array  # int8
    scale: Array  # the matrix's dtype, 1 along the axis that products sum over


def round_matrix(weight: Array, axis: int) -> Rounded:
    """Rounds each output to whole multiples of a scale of its own; `axis` is the one that products sum over.

    The scale is rounded to the matrix's dtype first, so that the values make up for that rounding.
    """
    wide = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis, keepdims=True) / _LARGEST
    scale = jnp.where(scale > 0, scale, 1.0).astype(weight.dtype)
    values = jnp.round(wide / scale.astype(jnp.float32))
    return Rounded(jnp.clip(values, -_LARGEST, _LARGEST).astype(jnp.int8), scale)


def _scaled(y: Array, scale: Array) -> Array:
    return y * along_last(scale.astype(jnp.float32).reshape(-1), y)
