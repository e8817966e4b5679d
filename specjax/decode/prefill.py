"""The prompt: read in chunks, so that memory follows the chunk and not the square of the prompt."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from specjax.cache import after
from specjax.types import Array, Model, PyTree

CHUNK = 512


class Prefilled(NamedTuple):
    """A cache that holds the prompts, and what the target said at their ends."""

    cache: PyTree
    logits: Array  # [B, V] float32 after the last prompt token
    hidden: tuple[Array, ...]  # [B, P, D] per layer asked for


def prefill(
    model: Model,
    params: PyTree,
    prompts: Array,
    lengths: Array,
    cache: PyTree,
    hidden_layers: tuple[int, ...] = (),
) -> Prefilled:
    """Commits the first `lengths` [B] tokens of the right-padded `prompts` [B, P] to an empty cache.

    Lengths of 0 are allowed and commit nothing; that row's logits mean nothing then.
    """
    batch, width = prompts.shape
    chunk = min(width, CHUNK)
    num_chunks = -(-width // chunk)
    # The first chunk takes what full ones leave over, so that the last ends with the prompts: a commit writes its whole
    # block, and a cache need not have room for more than the prompts.
    first = width - (num_chunks - 1) * chunk

    def read(start, size: int, cache: PyTree) -> tuple[PyTree, Array, tuple[Array, ...]]:
        tokens = lax.dynamic_slice_in_dim(prompts, start, size, 1)
        last = jnp.clip(lengths - 1 - start, 0, size - 1)[:, None]
        block = model.init_block(params, batch, size)
        out = model.apply(params, tokens, cache, block, logits_at=last, hidden_layers=hidden_layers)
        keep = after(jnp.clip(lengths - start, 0, size), jnp.argmax(out.logits[:, 0], -1))
        return model.commit(cache, out.block, keep, None), out.logits[:, 0], out.hidden

    cache, logits, hidden = read(0, first, cache)
    if num_chunks == 1:
        return Prefilled(cache, logits, hidden)

    def step(carry, start):
        cache, logits = carry
        cache, chunk_logits, hidden = read(start, chunk, cache)
        reaches = lengths > start  # the last chunk that a row reaches holds its end
        return (cache, jnp.where(reaches[:, None], chunk_logits, logits)), hidden

    (cache, logits), more = lax.scan(step, (cache, logits), first + chunk * jnp.arange(num_chunks - 1))
    hidden = tuple(
        jnp.concatenate([start, jnp.moveaxis(rest, 0, 1).reshape(batch, -1, start.shape[-1])], 1)
        for start, rest in zip(hidden, more, strict=True)
    )
    return Prefilled(cache, logits, hidden)
