"""Shapes of parameters and state with a sharding each, as the layout of a model says."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from specjax.aot.shapes import Shaped
from specjax.sharding import Layout, spec
from specjax.types import PyTree


def params_on(part: Shaped, dtype: Any) -> PyTree:
    """Shapes of the parameters in `dtype`, cut as the family's rules say."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        part.built.abstract,
        part.places(),
    )


def state_on(layout: Layout, state: PyTree, batch: int) -> PyTree:
    """Shapes of the loop's state, or of its request, with a sharding each: rows and heads are cut, scalars are not."""

    def place(leaf) -> jax.ShapeDtypeStruct:
        roles = ("rows",) if leaf.ndim and leaf.shape[0] == batch else (None,) * min(leaf.ndim, 1)
        if leaf.ndim == 4:  # [B, Hkv, slots, D]
            roles = (*roles, "heads")
        if leaf.ndim == 3:  # [B, K, V], a draft's distributions
            roles = (*roles, None, "width")
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(layout.mesh, spec(layout, roles, leaf.shape))
        )

    return jax.tree.map(place, state)


def bytes_per_chip(tree: PyTree) -> int:
    """Bytes per chip of the arrays of `tree`, which have shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
