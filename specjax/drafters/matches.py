"""Where the end of a row's text occurred before in it: longest matches first, recent ones before old ones."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from specjax.types import Array

END = -1  # after each text of a store; no token
_CHUNK = 512  # places that are compared at once; a search ends with the chunk in which every row has found enough


class Matches(NamedTuple):
    """The best `count` matches of each row, best first."""

    places: Array  # [B, M] int32: place in the text of the token that followed the match; 0 where there is none
    sizes: Array  # [B, M] int32: matched tokens, n_min..n_max; 0 where there is none


def find_matches(tokens: Array, lengths: Array, wanted: Array, *, n_min: int, n_max: int, count: int = 1) -> Matches:
    """Searches each row's text for its own last tokens.

    A match is a run of n tokens that equals the text's last n, ends before the text does, and cannot be longer; more
    than n_max tokens are not compared. A match may overlap the text's end, as in "abab". The search goes backwards in
    chunks over the live text, so it costs what the text is long, not what the buffer holds. It ends early if every
    wanted row has `count` matches of n_max tokens.

    Args:
      tokens: [B, C] int32, the rows' texts; entries past `lengths` are arbitrary.
      lengths: [B] int32, 1 or more.
      wanted: [B] bool, rows that need matches; the others may find none.
      n_min: tokens that must match at least, 1 or more.
      n_max: tokens that are compared at most.
      count: M, matches a row.

    Raises:
      ValueError: (n_max + 1) * (C + 1) is not below 2**31.

    >>> text = jnp.array([[5, 6, 7, 5, 6, 8, 5, 6, 0]])
    >>> find_matches(text, jnp.array([8]), jnp.array([True]), n_min=1, n_max=4, count=2).places.tolist()
    [[5, 2]]
    """
    batch, slots = tokens.shape
    if (n_max + 1) * (slots + 1) >= 2**31:
        raise ValueError(
            f"with n_max={n_max} a row may hold {2**31 // (n_max + 1) - 2} tokens at most, this buffer has {slots}: "
            "lower n_max or capacity."
        )
    chunk = min(_CHUNK, slots)
    size = min(chunk + n_max, slots)
    # Suffix tokens, last one first; -1, which is no token, before the text begins.
    back = lengths[:, None] - 1 - jnp.arange(n_max)[None]
    suffix = jnp.where(back >= 0, jnp.take_along_axis(tokens, jnp.maximum(back, 0), 1), -1)
    best = jnp.zeros((batch, count), jnp.int32)  # a match as one number: size * (C + 1) + place, so order is rank
    longest = jnp.max(jnp.where(wanted, lengths, 0))

    def search(start: Array | int, best: Array) -> Array:
        """With the matches before places start..start + chunk - 1."""
        base = jnp.clip(start - n_max, 0, slots - size)
        window = lax.dynamic_slice_in_dim(tokens, base, size, 1)
        equal, matched = jnp.ones((batch, size), bool), jnp.zeros((batch, size), jnp.int32)
        for step in range(n_max):
            shifted = jnp.pad(window, ((0, 0), (step, 0)), constant_values=-2)[:, :size]
            equal = equal & (shifted == suffix[:, step, None])
            matched = matched + equal.astype(jnp.int32)
        place = base + 1 + jnp.arange(size)[None]  # of the token after each match
        is_inside = (place >= start) & (place < start + chunk) & (place < lengths[:, None])
        rank = jnp.where(is_inside & (matched >= n_min), matched * (slots + 1) + place, 0)
        if count == 1:
            return jnp.maximum(best, jnp.max(rank, -1, keepdims=True))
        return lax.top_k(jnp.concatenate([best, rank], 1), count)[0]

    if chunk == slots:
        best = search(0, best)
    else:

        def turn(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            end, best = carry
            return end - chunk, search(end - chunk, best)

        def is_unfinished(carry: tuple[Array, Array]) -> Array:
            end, best = carry
            return (end > 0) & jnp.any(wanted & (best[:, -1] < n_max * (slots + 1)))

        _, best = lax.while_loop(is_unfinished, turn, (longest, best))
    return Matches(best % (slots + 1), best // (slots + 1))


def continuations(tokens: Array, lengths: Array, places: Array, longest: int) -> Array:
    """[B, M, K] int32: the K = `longest` tokens from each of `places` [B, M] on.

    What the text does not hold yet is what its end would be if it went on with the match's distance as its period: the
    continuation of "abcabc" is "abcabcabc ...".

    >>> continuations(jnp.array([[1, 2, 3, 1, 0]]), jnp.array([4]), jnp.array([[1]]), 5).tolist()
    [[[2, 3, 1, 2, 3]]]
    """
    period = jnp.maximum(lengths[:, None] - places, 1)
    at = places[..., None] + jnp.arange(longest)[None, None] % period[..., None]
    batch, count, _ = at.shape
    return jnp.take_along_axis(tokens, at.reshape(batch, -1), 1).reshape(batch, count, longest)


def most_frequent(following: Array, counts: Array) -> Array:
    """[B, K] int32: step by step the token that most of the continuations [B, M, K] have which agree so far.

    Only those that count [B, M] are asked. Of equally frequent tokens the first one's is taken. END, which is -1, is
    chosen only if there is nothing else, and from then on.
    """

    def step(agree: Array, tokens: Array) -> tuple[Array, Array]:
        agree = agree & (tokens != END)
        votes = jnp.sum(agree[:, None, :] & (tokens[:, None, :] == tokens[:, :, None]), -1)
        chosen = jnp.argmax(jnp.where(agree, votes, 0), -1)
        token = jnp.where(jnp.any(agree, -1, keepdims=True), jnp.take_along_axis(tokens, chosen[:, None], 1), END)
        return agree & (tokens == token), token[:, 0]

    _, drafted = lax.scan(step, counts, jnp.moveaxis(following, 2, 0))
    return drafted.T
