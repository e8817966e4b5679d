"""What a family of models is to the rest: an architecture made from a config, and its Flax module as a `Model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from specjax import cache
from specjax.types import Model


class Architecture(NamedTuple):
    """One configuration of a family."""

    model: Model
    abstract: nnx.State  # the parameters' shapes; paths are the checkpoint's tensor names
    make: Callable[[nnx.Rngs], nnx.Module]
    prefix: str = ""  # what checkpoints saved from the bare base model leave out ("transformer.", say)
    ignored: tuple[str, ...] = ()  # endings of tensors that old checkpoints hold and nobody needs
    tied: tuple[str, str] | None = None  # (left out, instead): an output layer that is the embedding


class Shape(NamedTuple):
    """The cache's dimensions."""

    layers: int
    heads: int
    head_dim: int


def architecture(
    make: Callable[[nnx.Rngs], nnx.Module],
    shape: Shape,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    **extra: Any,
) -> Architecture:
    """Wraps a Flax NNX module as pure functions.

    The module is called with (tokens, cache, block, *, depths, visible, logits_at, hidden_layers) and returns an
    Output; see llama.py. Caches take the parameters' dtype.
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    num_tensors = len(jax.tree.leaves(abstract))

    def apply(params, tokens, cache, block, **options):
        if len(jax.tree.leaves(params)) != num_tensors:
            raise ValueError(
                f"these parameters are another model's: this one has {num_tensors} tensors, got "
                f"{len(jax.tree.leaves(params))}. Are the target's and the draft's exchanged?"
            )
        return nnx.merge(graph, params)(tokens, cache, block, **options)

    def init_cache(params, batch: int, slots: int) -> cache.KVCache:
        return cache.init_cache(shape.layers, batch, shape.heads, slots, shape.head_dim, _dtype(params))

    def init_block(params, batch: int, size: int) -> cache.KVBlock:
        return cache.init_block(shape.layers, batch, shape.heads, size, shape.head_dim, _dtype(params))

    model = Model(apply, init_cache, init_block, cache.commit, vocab_size, max_positions)
    return Architecture(model, abstract, make, **extra)


def init(built: Architecture, key: jax.Array, dtype: Any = jnp.float32) -> nnx.State:
    """Random parameters, for tests and for training from scratch."""
    state = nnx.state(built.make(nnx.Rngs(key)))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), state)


def _dtype(params: nnx.State):
    return jax.tree.leaves(params)[0].dtype
