"""Two Models whose state is not a list of keys and values, right and wrong."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import Model, Output

VOCAB, WIDTH = 5, 8


class States(NamedTuple):
    """A recurrent block: the state after each token."""

    states: jax.Array  # [B, N, WIDTH]
    filled: jax.Array


def recurrent(keeps_rejected=False):
    """h' = tanh(h W + E[token]). `keeps_rejected` is known bug 8: the state after the block, whatever was kept."""

    def init_cache(params, batch, slots):
        del params, slots
        return jnp.zeros((batch, WIDTH))

    def init_block(params, batch, size):
        del params
        return States(jnp.zeros((batch, size, WIDTH)), jnp.int32(0))

    def apply(params, tokens, cache, block, *, depths=None, visible=None, logits_at=None, hidden_layers=()):
        del depths, visible
        mix, embed, out = params
        last = lax.dynamic_index_in_dim(block.states, jnp.maximum(block.filled - 1, 0), 1, keepdims=False)
        state = jnp.where(block.filled == 0, cache, last)

        def step(state, token):
            state = jnp.tanh(state @ mix + embed[token])
            return state, state

        _, states = lax.scan(step, state, tokens.T)
        states = jnp.moveaxis(states, 0, 1)
        logits = states @ out
        if logits_at is not None:
            logits = jnp.take_along_axis(logits, logits_at[..., None], 1)
        appended = lax.dynamic_update_slice_in_dim(block.states, states, block.filled, 1)
        hidden = tuple(states for _ in hidden_layers)
        return Output(logits, hidden, States(appended, block.filled + tokens.shape[1]))

    def commit(cache, block, keep, path=None):
        del path
        kept = jnp.full_like(keep, block.states.shape[1]) if keeps_rejected else keep
        place = jnp.maximum(kept - 1, 0)[:, None, None]
        return jnp.where((kept > 0)[:, None], jnp.take_along_axis(block.states, place, 1)[:, 0], cache)

    return Model(apply, init_cache, init_block, commit, VOCAB, trees=False)


def recurrent_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((WIDTH, WIDTH), (VOCAB, WIDTH), (WIDTH, VOCAB))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


class Ring(NamedTuple):
    """The last tokens of each row: position p lies in slot p % slots."""

    tokens: jax.Array  # [B, slots]
    lengths: jax.Array


class RingBlock(NamedTuple):
    tokens: jax.Array  # [B, N]
    filled: jax.Array


def ring(window=3, spare=8):
    """Logits from the last `window` tokens, kept in a ring of window + spare slots into which commit writes the whole
    block. spare = 0 is known bug 9: rejected tokens overwrite live ones."""
    slots = window + spare

    def init_cache(params, batch, capacity):
        del params, capacity
        return Ring(jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def init_block(params, batch, size):
        del params
        return RingBlock(jnp.zeros((batch, size), jnp.int32), jnp.int32(0))

    def apply(params, tokens, cache, block, *, depths=None, visible=None, logits_at=None, hidden_layers=()):
        del depths, visible
        batch, width = tokens.shape
        new = lax.dynamic_update_slice_in_dim(block.tokens, tokens, block.filled, 1)
        logits = jnp.zeros((batch, width, VOCAB))
        for back in range(window):
            inside = block.filled + jnp.arange(width)[None] - back  # block slot
            position = cache.lengths[:, None] + inside
            in_block = jnp.take_along_axis(new, jnp.broadcast_to(jnp.maximum(inside, 0), (batch, width)), 1)
            in_cache = jnp.take_along_axis(cache.tokens, position % slots, 1)
            token = jnp.where(inside >= 0, in_block, in_cache)
            logits = logits + jnp.where((position >= 0)[..., None], params[back, token], 0.0)
        hidden = tuple(logits for _ in hidden_layers)
        if logits_at is not None:
            logits = jnp.take_along_axis(logits, logits_at[..., None], 1)
        return Output(logits, hidden, RingBlock(new, block.filled + width))

    def commit(cache, block, keep, path=None):
        del path
        rows = jnp.arange(len(keep))[:, None]
        tokens = cache.tokens
        for place in range(block.tokens.shape[1]):  # one by one: later tokens win where the ring is too small
            at = (cache.lengths[:, None] + place) % slots
            tokens = tokens.at[rows, at].set(block.tokens[:, place : place + 1])
        return Ring(tokens, cache.lengths + keep)

    return Model(apply, init_cache, init_block, commit, VOCAB, trees=False)


def ring_params(window=3):
    return jax.random.normal(jax.random.key(1), (window, VOCAB, VOCAB))
