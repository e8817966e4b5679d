"""Token trees: what a draft's parent indices mean for one parallel forward pass.

Block slot 0 is the root (the last emitted token); draft token n sits in slot n + 1. Parents come before their children.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from specjax.types import Array


class Layout(NamedTuple):
    """How a block of root and draft tokens is laid out for the target."""

    depths: Array  # [B or 1, N+1] int32, distance from the root
    visible: Array  # [B or 1, N+1, N+1] bool: a token sees its ancestors and itself


def chain(nodes: int) -> Layout:
    """The layout of `nodes` draft tokens in a row."""
    place = jnp.arange(nodes + 1)
    return Layout(place[None], (place[None, :] <= place[:, None])[None])


def layout(parents: Array) -> Layout:
    """Depths and ancestor mask from `parents` [N] or [B, N] int32 (-1 is the root).

    >>> layout(jnp.array([-1, 0, 0])).depths.tolist()
    [[0, 1, 2, 2]]
    """
    if parents.ndim == 1:
        parents = parents[None]
    batch, nodes = parents.shape
    visible = jnp.broadcast_to(jnp.eye(nodes + 1, dtype=bool), (batch, nodes + 1, nodes + 1))
    for node in range(nodes):  # static and small; a parent's row is complete before its child's is made
        inherited = jnp.take_along_axis(visible, parents[:, node, None, None] + 1, 1)[:, 0]
        visible = visible.at[:, node + 1].set(visible[:, node + 1] | inherited)
    return Layout(jnp.sum(visible, -1, dtype=jnp.int32) - 1, visible)
