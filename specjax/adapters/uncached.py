"""A module without a cache as a Model: every pass reads the whole text again. Exact, but slow for long texts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.adapters.wrapped import PassInput, PassOutput, Wrapped
from specjax.types import Array, Model, Output, PyTree


class Text(NamedTuple):
    """The cache of such a model: the text itself."""

    tokens: Array  # [B, S] int32
    lengths: Array  # [B] int32


class TextBlock(NamedTuple):
    """The tokens of a round, with their depths for trees."""

    tokens: Array  # [B, N] int32
    depths: Array  # [B, N] int32
    filled: Array  # [] int32


def uncached(wrapped: Wrapped, vocab_size: int, *, max_positions: int | None = None) -> Model:
    """The Model. Trees need a module that takes positions and mask; any other sees a chain by its own causal mask."""

    def init_cache(params: PyTree, batch: int, slots: int) -> Text:
        del params
        return Text(jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def init_block(params: PyTree, batch: int, size: int) -> TextBlock:
        del params
        return TextBlock(jnp.zeros((batch, size), jnp.int32), jnp.zeros((batch, size), jnp.int32), jnp.int32(0))

    def apply(
        params: PyTree, tokens: Array, cache: Text, block: TextBlock, *, depths: Array | None = None,
        visible: Array | None = None, logits_at: Array | None = None, hidden_layers: tuple[int, ...] = (),
    ) -> Output:  # fmt: skip
        del hidden_layers
        batch, width = tokens.shape
        size = block.tokens.shape[1]
        order = block.filled + jnp.arange(width)
        steps = order if depths is None else depths
        steps = jnp.broadcast_to(steps if steps.ndim == 2 else steps[None], (batch, width))
        appended = TextBlock(
            jax.lax.dynamic_update_slice_in_dim(block.tokens, tokens, block.filled, 1),
            jax.lax.dynamic_update_slice_in_dim(block.depths, steps, block.filled, 1),
            block.filled + width,
        )
        # No token past the architecture's last position is ever emitted, and a table of positions ends there.
        slots = min(cache.tokens.shape[1], max_positions or cache.tokens.shape[1])
        slot = jnp.arange(slots)[None]
        inside = slot - cache.lengths[:, None]  # [B, S]: which place of the block
        at = jnp.clip(inside, 0, size - 1)
        is_inside = inside >= 0
        text = jnp.where(is_inside, jnp.take_along_axis(appended.tokens, at, 1), cache.tokens[:, :slots])
        deep = cache.lengths[:, None] + jnp.take_along_axis(appended.depths, at, 1)
        positions = jnp.minimum(jnp.where(is_inside & (inside < size), deep, slot), slots - 1)
        seen = jnp.broadcast_to(slot[:, :, None] >= slot[:, None, :], (batch, slots, slots))
        if visible is not None:
            seen = _branches(seen, visible, block.filled, at, is_inside & (inside < size))
        logits = wrapped.run(params, PassInput(text, positions, seen)).logits.astype(jnp.float32)
        places = order[None] if logits_at is None else block.filled + logits_at
        places = jnp.clip(cache.lengths[:, None] + places, 0, slots - 1)
        return Output(jnp.take_along_axis(logits, places[..., None], 1), (), appended)

    def commit(cache: Text, block: TextBlock, keep: Array, path: Array | None = None) -> Text:
        new = block.tokens if path is None else jnp.take_along_axis(block.tokens, path, 1)

        @jax.vmap
        def append(text: Array, more: Array, start: Array) -> Array:
            return text.at[start + jnp.arange(more.shape[0])].set(more, mode="drop")

        return Text(append(cache.tokens, new, cache.lengths), cache.lengths + keep)

    return Model(
        apply, init_cache, init_block, commit, vocab_size, max_positions, trees=wrapped.sees_trees, hidden=False
    )


def _branches(seen: Array, visible: Array, filled: Array, at: Array, is_inside: Array) -> Array:
    """The causal mask, with `visible` for the tokens of the block."""
    batch, slots, _ = seen.shape
    size = visible.shape[-1]
    visible = jnp.broadcast_to(visible if visible.ndim == 3 else visible[None], (batch, *visible.shape[-2:]))
    whole = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool))[None], (batch, size, size))
    whole = jax.lax.dynamic_update_slice_in_dim(whole, visible, filled, 1)
    by_row = jnp.take_along_axis(whole, jnp.broadcast_to(at[:, :, None], (batch, slots, size)), 1)
    own = jnp.take_along_axis(by_row, jnp.broadcast_to(at[:, None, :], (batch, slots, slots)), 2)
    both = is_inside[:, :, None] & is_inside[:, None, :]
    return jnp.where(both, own, seen)


def with_fresh_cache(wrapped: Wrapped) -> Wrapped:
    """For a module that cannot run without a cache: every pass gets an empty one, which is dropped afterwards."""
    assert wrapped.init_cache is not None
    make = wrapped.init_cache

    def run(params: PyTree, feed: PassInput) -> PassOutput:
        return wrapped.run(params, feed._replace(cache=make(*feed.tokens.shape)))

    return wrapped._replace(run=run)
