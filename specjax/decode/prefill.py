"""Reads long texts in chunks, so that memory grows with the chunk and not with the square of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from specjax.cache import after
from specjax.types import Array, Extended, Model, PyTree

CHUNK = 512

# Called with each chunk: (state, tokens [B, T], hidden [B, T, D] per layer, keep [B], the target's cache) -> state.
Read = Callable[[PyTree, Array, tuple[Array, ...], Array, PyTree], PyTree]


class Prefilled(NamedTuple):
    """A cache that holds the prompts, and the target's logits at their ends."""

    cache: PyTree
    logits: Array  # [B, V] float32 after the last prompt token
    state: PyTree  # what the last call of `read` returned


def extend(
    model: Model,
    params: PyTree,
    tokens: Array,
    cache: PyTree,
    keep: Array,
    *,
    logits_at: Array,
    hidden_layers: tuple[int, ...] = (),
) -> Extended:
    """Reads tokens [B, T] into the cache and keeps the first `keep` [B] of them; see `types.Extend`."""
    if model.extend is not None:
        return model.extend(params, tokens, cache, keep, logits_at=logits_at, hidden_layers=hidden_layers)
    block = model.init_block(params, *tokens.shape)
    out = model.apply(params, tokens, cache, block, logits_at=logits_at, hidden_layers=hidden_layers)
    keep = after(keep, jnp.argmax(out.logits[:, 0], -1))
    return Extended(model.commit(cache, out.block, keep, None), out.logits, out.hidden)


def prefill(
    model: Model,
    params: PyTree,
    prompts: Array,
    lengths: Array,
    cache: PyTree,
    *,
    hidden_layers: tuple[int, ...] = (),
    read: Read = lambda state, *chunk: state,
    state: PyTree = (),
) -> Prefilled:
    """Reads the first `lengths` [B] tokens of the right-padded `prompts` [B, P] into an empty cache.

    A length of 0 is allowed: such a row keeps nothing, and its logits have no meaning.
    """
    width = prompts.shape[1]
    chunk = min(width, CHUNK)
    num_chunks = -(-width // chunk)
    # The first chunk is the shorter one, so that the last chunk ends with the prompts: a commit writes its whole block,
    # and a cache need not have room for more than the prompts.
    first = width - (num_chunks - 1) * chunk

    def one(start: Array | int, size: int, cache: PyTree, state: PyTree) -> Prefilled:
        tokens = lax.dynamic_slice_in_dim(prompts, start, size, 1)
        last, keep = jnp.clip(lengths - 1 - start, 0, size - 1)[:, None], jnp.clip(lengths - start, 0, size)
        out = extend(model, params, tokens, cache, keep, logits_at=last, hidden_layers=hidden_layers)
        return Prefilled(out.cache, out.logits[:, 0], read(state, tokens, out.hidden, keep, out.cache))

    def turn(index: Array, done: Prefilled) -> Prefilled:
        start = first + chunk * index
        found = one(start, chunk, done.cache, done.state)
        reaches = lengths > start  # the last chunk that a row reaches holds the row's end
        return found._replace(logits=jnp.where(reaches[:, None], found.logits, done.logits))

    done = one(0, first, cache, state)
    return done if num_chunks == 1 else lax.fori_loop(0, num_chunks - 1, turn, done)
