"""Texts whose places are sorted by the tokens before them, so that those like the end of a text are found in log time.

A suffix array of the texts read backwards, sorted to a fixed depth: places that share their last n tokens stand side by
side, for every n up to the depth at once. So one search gives the longest match, a second one all places that have it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from specjax.drafters.matches import END
from specjax.types import Array

_PIVOTS = 15  # of a search step: 1,000,000 places take six steps
_UNUSED = np.iinfo(np.int32).max  # sorts places without a text behind all others


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "order", "count"], meta_fields=["depth"])
@dataclasses.dataclass(frozen=True)
class SortedTexts:
    """Texts in a buffer of fixed size, and the order of their places."""

    tokens: Array  # [S] int32, the texts one after another, each followed by END; the newest last, END before the first
    order: Array  # [S] int32, places in `tokens`, sorted by the tokens before each place, the nearest first
    count: Array  # [] int32, the first of `order`: places with a token, and at least one of the same text before it
    depth: int  # tokens that were compared; longer matches are not told apart

    @property
    def size(self) -> int:
        """S."""
        return self.tokens.shape[0]


def sort_texts(texts: Iterable[ArrayLike], size: int, depth: int) -> SortedTexts:
    """Sorts on the host: seconds for a million tokens. Of more tokens than fit the oldest are dropped."""
    parts = [np.append(np.asarray(text, np.int32), np.int32(END)) for text in texts]
    flat = np.concatenate([np.zeros((0,), np.int32), *parts])[-size:]
    tokens = np.concatenate([np.full((size - len(flat),), END, np.int32), flat])
    keys, is_place = _keys(np, tokens, depth)
    order = np.lexsort(keys[::-1]).astype(np.int32)
    return SortedTexts(jnp.asarray(tokens), jnp.asarray(order), jnp.int32(is_place.sum()), depth)


def sort_on_device(tokens: Array, depth: int) -> SortedTexts:
    """The same of tokens [S] that are in place already; inside jit, for thousands of tokens rather than millions."""
    keys, is_place = _keys(jnp, tokens, depth)
    *_, order = lax.sort((*keys, jnp.arange(tokens.shape[0], dtype=jnp.int32)), num_keys=depth)
    return SortedTexts(tokens, order, jnp.sum(is_place, dtype=jnp.int32), depth)


def _keys(xp, tokens, depth: int):
    """The tokens before each place, nearest first: `depth` arrays [S]; and which places are ones, [S] bool."""
    padded = xp.concatenate([xp.full((depth,), END, xp.int32), tokens])
    before = [padded[depth - 1 - back : len(padded) - 1 - back] for back in range(depth)]
    is_place = (tokens != END) & (before[0] != END)
    return [xp.where(is_place, key, _UNUSED) for key in before], is_place


def append_texts(tokens: Array, texts: Array, lengths: Array) -> Array:
    """[S] int32: the buffer after texts [B, C] of so many tokens [B] were added at its end; the oldest are dropped."""
    size, place = tokens.shape[0], jnp.arange(texts.shape[1] + 1)[None]
    new = jnp.where(place < lengths[:, None], jnp.pad(texts, ((0, 0), (0, 1))), END)  # an END after each
    is_new = (place <= lengths[:, None]) & (lengths[:, None] > 0)
    is_old = jnp.cumsum((tokens != END).astype(jnp.int32)) > 0  # all but the empty front
    kept = jnp.concatenate([is_old, is_new.reshape(-1)])
    behind = jnp.cumsum(kept[::-1].astype(jnp.int32))[::-1]  # tokens from each on, itself included
    at = jnp.where(kept & (behind <= size), size - behind, size)
    return jnp.full((size,), END, jnp.int32).at[at].set(jnp.concatenate([tokens, new.reshape(-1)]), mode="drop")


def find_longest(texts: SortedTexts, suffix: Array, *, n_min: int) -> tuple[Array, Array, Array]:
    """The places whose preceding tokens match the most of `suffix`.

    Args:
      texts: to search.
      suffix: [B, depth] int32, the last tokens of each row, the last one first; -2 where the row has none.
      n_min: tokens that must match at least.

    Returns:
      sizes [B] int32, matched tokens, 0 if fewer than n_min; first and count [B] int32: where in `texts.order` the
      places stand.
    """
    depth = texts.depth
    at = _search(texts, suffix, jnp.full(suffix.shape[:1], depth), from_right=False)
    neighbours = jnp.stack([at - 1, at], 1)
    is_there = (neighbours >= 0) & (neighbours < texts.count)
    before = _before(texts, jnp.clip(neighbours, 0, texts.size - 1))
    equal = jnp.cumprod((before == suffix[:, None]).astype(jnp.int32), -1)
    sizes = jnp.max(jnp.where(is_there, jnp.sum(equal, -1), 0), -1)
    sizes = jnp.where(sizes >= n_min, sizes, 0)
    first, end = (_search(texts, suffix, sizes, from_right=side) for side in (False, True))
    return sizes, first, jnp.where(sizes > 0, end - first, 0)


def _before(texts: SortedTexts, at: Array) -> Array:
    """[B, n, depth] int32: the tokens before the places that stand at `at` [B, n] of the order, nearest first."""
    place = texts.order[at][..., None] - 1 - jnp.arange(texts.depth)[None, None]
    return jnp.where(place >= 0, texts.tokens[jnp.maximum(place, 0)], END)


def _search(texts: SortedTexts, suffix: Array, sizes: Array, *, from_right: bool) -> Array:
    """[B] int32: how many places come before the suffix, by its first `sizes` [B] tokens; or, from the right, before or
    with it. A binary search with fifteen pivots a step: few steps count more than few comparisons."""
    is_key = jnp.arange(texts.depth)[None, None] < sizes[:, None, None]

    def is_before(at: Array) -> Array:
        difference = jnp.where(is_key, _before(texts, at) - suffix[:, None], 0)
        decisive = jnp.argmax(difference != 0, -1)[..., None]
        sign = jnp.take_along_axis(difference, decisive, -1)[..., 0]
        return sign <= 0 if from_right else sign < 0

    def step(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        share, turn = (high - low)[:, None], jnp.arange(1, _PIVOTS + 1)[None]
        # low + share * turn / 16, in parts that stay below 2**31
        pivots = low[:, None] + share // (_PIVOTS + 1) * turn + share % (_PIVOTS + 1) * turn // (_PIVOTS + 1)
        is_inside = pivots < high[:, None]
        passed = is_inside & is_before(jnp.clip(pivots, 0, texts.size - 1))
        return (
            jnp.max(jnp.where(passed, pivots + 1, low[:, None]), -1),
            jnp.min(jnp.where(is_inside & ~passed, pivots, high[:, None]), -1),
        )

    batch = suffix.shape[0]
    bounds = jnp.zeros((batch,), jnp.int32), jnp.broadcast_to(texts.count, (batch,))
    steps = math.ceil(math.log(texts.size + 1, _PIVOTS + 1)) + 2
    return lax.fori_loop(0, steps, step, bounds)[0]
