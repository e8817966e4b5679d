"""Randomness: every number drawn has an address, and no address is used twice.

A row has one key, made from the caller's key and the row's seed. From it: one key per (role, index), where the
index is the row's round or the position in the text, then one per place inside the round. Nothing depends on the
batch, the padding or the capacity, so a row draws the same numbers alone and in any batch. Noise that a later round
used again would bias verification (block verification most of all), so the address includes the round.

The row's key is always a Threefry key. Under `vmap`, JAX's other implementations (rbg, unsafe_rbg) draw the whole batch
from the first key: rows would share their noise, and it would no longer change once the first row has ended.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp

from specjax.types import Array

IMPLEMENTATION = "threefry2x32"


class Role(enum.IntEnum):
    """What a number is drawn for. TARGET is addressed by position in the text, the others by round."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def row_keys(key: Array, seeds: Array) -> Array:
    """The keys of each row, [B, roles]. `key`: a typed key of any implementation, or a legacy uint32 one; `seeds`: [B]
    int32."""
    own = jax.vmap(jax.random.fold_in, (None, 0))(counter_based(key), seeds)
    roles = jnp.arange(len(Role), dtype=jnp.uint32)
    return jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, roles))(own)


def counter_based(key: Array) -> Array:
    """A Threefry key made of all bits of `key`; a Threefry key comes back as it is.

    >>> counter_based(jax.random.key(3, impl="rbg")).dtype
    key<fry>
    """
    bits = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    bits = bits.astype(jnp.uint32).reshape(-1)
    own = jax.random.wrap_key_data(jnp.resize(bits[:2], (2,)), impl=IMPLEMENTATION)
    for word in range(2, bits.shape[0]):
        own = jax.random.fold_in(own, bits[word])
    return own


def derive(keys: Array, role: Role, index: Array) -> Array:
    """The keys of one role at one round or position. `keys`: [B, roles]; `index`: [B] or [] int32; returns [B]."""
    return jax.vmap(jax.random.fold_in)(keys[:, role], jnp.broadcast_to(index, keys.shape[:1]))


def uniforms(keys: Array, count: int) -> Array:
    """[B, count] float32 in [0, 1), from keys [B]. Each place has its own address: a larger count adds numbers only."""
    places = jnp.arange(count, dtype=jnp.uint32)
    own = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, places))(keys)
    return jax.vmap(jax.vmap(jax.random.uniform))(own)


def gumbels(keys: Array, width: int) -> Array:
    """[B, width] float32 standard Gumbel noise, from keys [B]."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (width,)))(keys)
