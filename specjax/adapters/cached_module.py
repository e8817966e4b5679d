"""A wrapped module with its own cache as a Model: a round uses some slots of the cache, and commit keeps a part of it.

The module writes at its cursor and attends through its mask, so cursor and mask decide which slots a round uses:

- the slots at each row's own length, if the cache has one cursor for each row: commit copies nothing;
- the last slots of the cache, the same for all rows, if it has one cursor for all rows: commit copies the accepted
  tokens to the end of their row. The live slots of a row stay contiguous, whatever the rows' lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.adapters.cache_axes import axes_of, copy_slots, set_cursors, slots_of
from specjax.adapters.wrapped import CacheMaker, PassInput, Wrapped, named_when_longer
from specjax.cache import after
from specjax.types import Array, Model, Output, PyTree


class ModuleCache(NamedTuple):
    """The module's own arrays. Slots past `lengths` hold rejected tokens, which its mask or cursor hides."""

    own: PyTree
    lengths: Array  # [B] int32


class ModuleBlock(NamedTuple):
    """A round under way. The module has written it into `own`, which replaces the cache from then on."""

    own: PyTree  # None before the first tokens
    room: Array  # [N] bool; only its shape is used
    filled: Array  # [] int32


class Placement(NamedTuple):
    """The slots that a round of N tokens uses in a cache."""

    start: Callable[[Array, int, int], Array]  # (lengths [B], N, slots) -> first slot [B]
    is_in_place: bool  # whether the accepted tokens of a chain are in their final slots already


AT_LENGTH = Placement(lambda lengths, size, slots: lengths, is_in_place=True)
AT_END = Placement(lambda lengths, size, slots: jnp.full_like(lengths, slots - size), is_in_place=False)


def cached_module(
    wrapped: Wrapped, placement: Placement, vocab_size: int, *, max_positions: int | None = None
) -> Model:
    """The module with its own cache. Trees need a module that takes positions and mask."""
    assert wrapped.init_cache is not None
    make, axes = wrapped.init_cache, axes_of(wrapped.init_cache)
    if placement.is_in_place:
        for leaf in axes:
            if leaf.slots is None and leaf.rows is None:
                raise ValueError(f"its cache keeps one cursor for all rows ({leaf.path})")

    def init_cache(params: PyTree, batch: int, slots: int) -> ModuleCache:
        del params
        if max_positions is not None and wrapped.takes.positions is None and slots > max_positions:
            raise ValueError(
                f"the buffers have {slots} places (the capacity, and a round past it), and this module, which counts "
                f"its positions by itself, has {max_positions}: make capacity smaller by {slots - max_positions}. "
                "(Left out, capacity is the prompts' width and max_new_tokens, at most the target's positions.)"
            )
        with named_when_longer(slots, max_positions):
            cache = make(batch, slots)
        slots_of(axes, cache, slots)
        return ModuleCache(cache, jnp.zeros((batch,), jnp.int32))

    def init_block(params: PyTree, batch: int, size: int) -> ModuleBlock:
        del params, batch
        return ModuleBlock(None, jnp.zeros((size,), bool), jnp.int32(0))

    def apply(
        params: PyTree, tokens: Array, cache: ModuleCache, block: ModuleBlock, *, depths: Array | None = None,
        visible: Array | None = None, logits_at: Array | None = None, hidden_layers: tuple[int, ...] = (),
    ) -> Output:  # fmt: skip
        del hidden_layers  # parts.check_fit and check_model know that there are none
        batch, width = tokens.shape
        size = block.room.shape[0]
        own = cache.own if block.own is None else block.own
        slots = slots_of(axes, own, 0)
        start = placement.start(cache.lengths, size, slots)
        order = block.filled + jnp.arange(width)
        steps = order if depths is None else depths
        positions = cache.lengths[:, None] + (steps[None] if steps.ndim == 1 else steps)
        if visible is None:
            visible = jnp.arange(size)[None, :] <= order[:, None]
        visible = jnp.broadcast_to(visible if visible.ndim == 3 else visible[None], (batch, width, size))
        out = wrapped.run(
            params,
            PassInput(
                tokens,
                positions if max_positions is None else jnp.minimum(positions, max_positions - 1),
                _over_slots(visible, cache.lengths, start, slots),
                set_cursors(axes, own, start + block.filled),
            ),
        )
        logits = out.logits.astype(jnp.float32)
        if logits_at is not None:
            logits = jnp.take_along_axis(logits, logits_at[..., None], 1)
        return Output(logits, (), ModuleBlock(_like(out.cache, own), block.room, block.filled + width))

    def commit(cache: ModuleCache, block: ModuleBlock, keep: Array, path: Array | None = None) -> ModuleCache:
        own = block.own
        if path is not None or not placement.is_in_place:
            size = block.room.shape[0]
            start = placement.start(cache.lengths, size, slots_of(axes, own, 0))
            own = copy_slots(axes, own, start, size, after(cache.lengths, keep), path)  # not before the last read
        return ModuleCache(own, cache.lengths + keep)

    return Model(
        apply, init_cache, init_block, commit, vocab_size, max_positions, trees=wrapped.sees_trees, hidden=False
    )


def row_by_row(wrapped: Wrapped) -> Wrapped:
    """The same module with each row by itself under vmap: one cursor for all rows becomes one cursor for each row."""
    assert wrapped.init_cache is not None
    make = wrapped.init_cache

    def init_cache(batch: int, slots: int) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (batch, *leaf.shape)), make(1, slots))

    def run(params: PyTree, feed: PassInput):
        alone = feed._replace(
            tokens=feed.tokens[:, None], positions=feed.positions[:, None], visible=feed.visible[:, None]
        )
        out = jax.vmap(wrapped.run, (None, 0))(params, alone)
        return out._replace(logits=out.logits[:, 0])

    return wrapped._replace(run=run, cache=CacheMaker(init_cache))


def _over_slots(visible: Array, lengths: Array, start: Array, slots: int) -> Array:
    """The slots that each token sees, [B, T, S]: the live slots, and those of the round that `visible` selects."""
    size = visible.shape[2]
    slot = jnp.arange(slots)[None]
    inside = slot - start[:, None]  # [B, S]
    is_inside = (inside >= 0) & (inside < size)
    at = jnp.broadcast_to(jnp.clip(inside, 0, size - 1)[:, None], (*visible.shape[:2], slots))
    seen = jnp.take_along_axis(visible, at, 2) & is_inside[:, None]
    return seen | (slot < lengths[:, None])[:, None]


def _like(cache: PyTree, own: PyTree) -> PyTree:
    """The cache that a pass returned, with the dtypes of the cache that it was given."""
    if cache is None:
        raise ValueError("it takes a cache and gives none back")
    ours, theirs = jax.tree.structure(own), jax.tree.structure(cache)
    if ours != theirs:
        raise ValueError(f"the cache that it gives back has another form than the one it took: {theirs}, not {ours}")
    return jax.tree.map(lambda new, old: new.astype(old.dtype), cache, own)
