"""Where parameters and state lie on a mesh: Megatron's cut, batch rows over the data axis."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax.types import PyTree


class Layout(NamedTuple):
    """Which mesh axes cut what."""

    mesh: Mesh
    rows: tuple[str, ...] = ("data",)  # batch rows
    heads: tuple[str, ...] = ("model",)  # key/value heads, and caches with them
    width: tuple[str, ...] = ("model", "sub")  # every other cut dimension: query heads, MLP, vocabulary

    def size(self, axes: tuple[str, ...]) -> int:
        """Chips along these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def params_on(layout: Layout, abstract: PyTree, dtype: Any) -> PyTree:
    """Shapes of the parameters in `dtype`, with a sharding each.

    Projections into a layer are cut by output, those out of it by input, the embedding and the output layer by
    vocabulary; a dimension that does not divide stays whole.
    """

    def place(path, leaf) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path)
        axes = layout.heads if "k_proj" in name or "v_proj" in name else layout.width
        spec = [None] * leaf.ndim
        at = 1 if "o_proj" in name or "down_proj" in name else 0
        if leaf.ndim > 1 and leaf.shape[at] % layout.size(axes) == 0:
            spec[at] = axes
        return _shaped(layout, leaf.shape, dtype, spec)

    return jax.tree_util.tree_map_with_path(place, abstract)


def state_on(layout: Layout, state: PyTree, batch: int) -> PyTree:
    """Shapes of the loop's state, or of its request, with a sharding each: rows and heads are cut, scalars are not."""

    def place(leaf) -> jax.ShapeDtypeStruct:
        spec = [None] * leaf.ndim
        if leaf.ndim and leaf.shape[0] == batch:
            spec[0] = layout.rows
        if leaf.ndim == 4:  # [B, Hkv, slots, D]
            spec[1] = layout.heads
        return _shaped(layout, leaf.shape, leaf.dtype, spec)

    return jax.tree.map(place, state)


def bytes_per_chip(tree: PyTree) -> int:
    """Of the arrays of `tree`, which have shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _shaped(layout: Layout, shape: tuple[int, ...], dtype: Any, spec: list) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, PartitionSpec(*spec)))
