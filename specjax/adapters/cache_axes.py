"""The axes of a wrapped module's cache: which axis counts rows, which counts slots, and which leaf is a cursor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import Array, PyTree

_ROWS, _SLOTS = (2, 3), (48, 64)


class LeafAxes(NamedTuple):
    """The axes of one array of a cache."""

    path: str
    rows: int | None  # the axis that counts rows
    slots: int | None  # the axis that counts slots; None: the array is a cursor


def axes_of(init_cache: Callable[[int, int], PyTree]) -> list[LeafAxes]:
    """Finds the axes by comparing the shapes of caches of different sizes; nothing is computed.

    Raises:
      ValueError: a leaf neither has an axis of slots nor is a cursor.
    """
    base, wider, longer = (
        _shapes(init_cache, rows, slots)
        for rows, slots in ((_ROWS[0], _SLOTS[0]), (_ROWS[1], _SLOTS[0]), (_ROWS[0], _SLOTS[1]))
    )
    if (ignored := slots_ignored(init_cache)) is not None:
        raise ValueError(ignored.rstrip("."))
    found = []
    for (path, leaf), (_, more_rows), (_, more_slots) in zip(base, wider, longer, strict=True):
        name = jax.tree_util.keystr(path)
        rows, slots = _differing(leaf, more_rows, name), _differing(leaf, more_slots, name)
        if slots is None and not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(
                f"the cache's {name} {leaf.dtype}{list(leaf.shape)} has the same shape for {_SLOTS[0]} and for "
                f"{_SLOTS[1]} slots, while others grow: every layer needs all the slots that init_cache is asked for "
                "(no ring of a sliding window), and a state that every token changes (recurrent) can't be rolled back "
                "from outside"
            )
        if slots is not None and rows is None:
            raise ValueError(f"the cache's {name} {list(leaf.shape)} has slots but no axis for rows")
        found.append(LeafAxes(name, rows, slots))
    return found


def slots_ignored(init_cache: Callable[[int, int], PyTree]) -> str | None:
    """A sentence about the problem, if caches for few and for many slots have the same shapes; None if they differ."""
    try:
        few, many = (_shapes(init_cache, _ROWS[0], slots) for slots in _SLOTS)
    except Exception:  # the error of someone else's function is reported where its cache is used
        return None
    if [leaf.shape for _, leaf in few] != [leaf.shape for _, leaf in many]:
        return None
    arrays = ", ".join(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in few[:3])
    return (
        f"Its init_cache ignores the number of slots that it is asked for: {_SLOTS[0]} and {_SLOTS[1]} slots for "
        f"{_ROWS[0]} rows give the same arrays ({arrays or 'none'}{', ...' if len(few) > 3 else ''}). Pass "
        "init_cache=lambda batch, slots: ... that makes as many slots as it is asked for. (If these are no slots but a "
        "state that every token changes, as recurrent layers have it: that can't be rolled back from outside.)"
    )


def _shapes(init_cache: Callable[[int, int], PyTree], rows: int, slots: int) -> list[tuple[Any, jax.ShapeDtypeStruct]]:
    """The arrays of an empty cache, by path; nothing is computed."""
    return jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init_cache(rows, slots)))


def slots_of(axes: list[LeafAxes], cache: PyTree, wanted: int) -> int:
    """The number of slots of this cache. Raises ValueError if leaves differ, or if there are fewer than `wanted`."""
    sizes = {
        leaf.path: array.shape[leaf.slots]
        for leaf, array in zip(axes, jax.tree.leaves(cache), strict=True)
        if leaf.slots is not None
    }
    path, fewest = min(sizes.items(), key=lambda item: item[1])
    if fewest < wanted or len(set(sizes.values())) > 1:
        raise ValueError(
            f"the cache's {path} has {fewest} slots where {wanted} were asked for, others {max(sizes.values())}: a "
            "ring that forgets can't be used here. Let init_cache give every layer all slots, or adapt with "
            "strategy='uncached'."
        )
    return fewest


def set_cursors(axes: list[LeafAxes], cache: PyTree, cursors: Array) -> PyTree:
    """The cache with its cursors set to `cursors` [B]; a cursor that all rows share is set to the first."""

    def one(leaf: LeafAxes, array: Array) -> Array:
        if leaf.slots is not None:
            return array
        if leaf.rows is None:
            return jnp.full_like(array, cursors[0])
        shape = [1] * array.ndim
        shape[leaf.rows] = -1
        return jnp.broadcast_to(cursors.reshape(shape), array.shape).astype(array.dtype)

    return _map(one, axes, cache)


def copy_slots(
    axes: list[LeafAxes], cache: PyTree, source: Array, size: int, target: Array, path: Array | None
) -> PyTree:
    """In each row b, copies `size` slots from source[b] on (or those at source[b] + path[b]) to target[b] on."""

    def one(leaf: LeafAxes, array: Array) -> Array:
        if leaf.slots is None:
            return array
        rows_axis, slots_axis = leaf.rows, leaf.slots
        assert rows_axis is not None  # axes_of has checked it

        def row(index: Array, copied: Array) -> Array:
            mine = lax.dynamic_slice_in_dim(copied, index, 1, rows_axis)
            piece = lax.dynamic_slice_in_dim(mine, source[index], size, slots_axis)
            if path is not None:
                piece = jnp.take(piece, path[index], slots_axis)
            starts: list[Any] = [0] * array.ndim
            starts[rows_axis], starts[slots_axis] = index, target[index]
            return lax.dynamic_update_slice(copied, piece, starts)

        return lax.fori_loop(0, array.shape[rows_axis], row, array)

    return _map(one, axes, cache)


def _differing(one: Any, other: Any, name: str) -> int | None:
    axes = [axis for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b]
    if len(axes) > 1:
        raise ValueError(f"the cache's {name} {list(one.shape)} grows along several axes at once")
    return axes[0] if axes else None


def _map(function: Callable[[LeafAxes, Array], Array], axes: list[LeafAxes], cache: PyTree) -> PyTree:
    arrays, structure = jax.tree.flatten(cache)
    return structure.unflatten([function(leaf, array) for leaf, array in zip(axes, arrays, strict=True)])
