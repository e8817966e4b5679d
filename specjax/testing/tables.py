"""Models whose distribution is a small table: all their sequences can be enumerated."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import Array, Model, Output


class TableCache(NamedTuple):
    """The last tokens of each row: a table depends on nothing else."""

    history: Array  # [B, order] int32, newest last; vocab_size stands for "before the text"
    lengths: Array  # [B] int32


class TableBlock(NamedTuple):
    """Tokens not yet committed."""

    tokens: Array  # [B, N] int32
    depths: Array  # [B, N] int32
    filled: Array  # [] int32


@functools.cache
def table_model(order: int, vocab_size: int, logits_size: int | None = None) -> Model:
    """A Model whose next-token logits are a table over the last `order` tokens.

    Its parameters are the table, [vocab_size + 1] * order + [logits_size] float32 (see `random_table`), where index
    vocab_size stands for places before the text. It is small enough to enumerate, and supports trees.

    Args:
      order: tokens of context, 1 or more.
      vocab_size: ids that may be emitted.
      logits_size: columns of the logits, at least vocab_size; more makes a padded vocabulary.
    """
    del logits_size  # the table's own shape says it; here for a distinct Model per padding

    def init_cache(params: Array, batch: int, slots: int) -> TableCache:
        del params, slots
        return TableCache(jnp.full((batch, order), vocab_size, jnp.int32), jnp.zeros((batch,), jnp.int32))

    def init_block(params: Array, batch: int, size: int) -> TableBlock:
        del params
        empty = jnp.zeros((batch, size), jnp.int32)
        return TableBlock(empty, empty, jnp.int32(0))

    def apply(params, tokens, cache, block, *, depths=None, visible=None, logits_at=None, hidden_layers=()) -> Output:
        batch, width = tokens.shape
        size = block.tokens.shape[1]
        steps = block.filled + jnp.arange(width) if depths is None else depths
        steps = jnp.broadcast_to(steps[None] if steps.ndim == 1 else steps, (batch, width))
        appended = TableBlock(
            lax.dynamic_update_slice_in_dim(block.tokens, tokens, block.filled, 1),
            lax.dynamic_update_slice_in_dim(block.depths, steps, block.filled, 1),
            block.filled + width,
        )
        if visible is None:
            visible = jnp.arange(size)[None] <= (block.filled + jnp.arange(width))[:, None]
        visible = jnp.broadcast_to(visible[None] if visible.ndim == 2 else visible, (batch, width, size))
        columns = [_ancestor(cache, appended, steps, visible, back) for back in range(order - 1, -1, -1)]
        logits = params[tuple(columns)].astype(jnp.float32)
        if logits_at is not None:
            logits = jnp.take_along_axis(logits, logits_at[..., None], 1)
        hidden = tuple(jax.nn.one_hot(tokens, vocab_size) for _ in hidden_layers)
        return Output(logits, hidden, appended)

    def commit(cache: TableCache, block: TableBlock, keep: Array, path: Array | None = None) -> TableCache:
        tokens = block.tokens if path is None else jnp.take_along_axis(block.tokens, path, 1)
        text = jnp.concatenate([cache.history, tokens], 1)
        newest = keep[:, None] + jnp.arange(order)[None]
        return TableCache(jnp.take_along_axis(text, newest, 1), cache.lengths + keep)

    return Model(apply, init_cache, init_block, commit, vocab_size)


def _ancestor(cache: TableCache, block: TableBlock, depths: Array, visible: Array, back: int) -> Array:
    """[B, T]: the token `back` steps before each new one, found in the block or else in the cache."""
    wanted = (depths - back)[:, :, None]  # [B, T, 1]
    is_it = visible & (block.depths[:, None, :] == wanted)
    in_block = jnp.take_along_axis(block.tokens, jnp.argmax(is_it, -1), 1)
    order = cache.history.shape[1]
    in_cache = jnp.take_along_axis(cache.history, jnp.clip(order + wanted[..., 0], 0, order - 1), 1)
    return jnp.where(wanted[..., 0] >= 0, in_block, in_cache)


def random_table(
    key: Array, *, order: int, vocab_size: int, logits_size: int | None = None, sharpness: float = 1.0
) -> Array:
    """Parameters for `table_model`: standard normal logits times `sharpness`."""
    shape = (vocab_size + 1,) * order + (logits_size or vocab_size,)
    return sharpness * jax.random.normal(key, shape)
