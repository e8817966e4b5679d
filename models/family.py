"""The interface of a model family: an architecture made from a config, and its Flax module as a `Model`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from specjax import cache
from specjax.sharding import Layout, Rules, param_sharding
from specjax.types import Model, PyTree


class Architecture(NamedTuple):
    """One configuration of a family."""

    model: Model
    abstract: nnx.State  # the parameters' shapes; paths are the checkpoint's tensor names
    make: Callable[[nnx.Rngs], nnx.Module]
    prefix: str = ""  # what checkpoints saved from the bare base model leave out ("transformer.", say)
    ignored: tuple[str, ...] = ()  # name endings of tensors in old checkpoints that are not needed
    tied: tuple[str, str] | None = None  # (left out, instead): an output layer that is the embedding
    rules: Rules = ()  # how parameters are cut over a mesh, by path


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
    layout: Layout | None = None,
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
        return cache.init_cache(shape.layers, batch, shape.heads, slots, shape.head_dim, _dtype(params), layout)

    def init_block(params, batch: int, size: int) -> cache.KVBlock:
        return cache.init_block(shape.layers, batch, shape.heads, size, shape.head_dim, _dtype(params), layout)

    commit = functools.partial(cache.commit, layout=layout)
    model = Model(apply, init_cache, init_block, commit, vocab_size, max_positions, layout=layout)
    return Architecture(model, abstract, make, **extra)


def init(built: Architecture, key: jax.Array, dtype: Any = jnp.float32) -> nnx.State:
    """Random parameters, for tests and for training from scratch; on a mesh, each device makes its own part."""

    def make(key: jax.Array) -> nnx.State:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(built.make(nnx.Rngs(key))))

    places = shardings(built)
    return make(key) if places is None else jax.jit(make, out_shardings=places)(key)


def shardings(built: Architecture) -> Any:
    """Where each parameter lies on the model's mesh, a tree like `abstract`; None without a layout."""
    if built.model.layout is None:
        return None
    return assemble(built, lambda name, place: place)


def assemble(built: Architecture, make: Callable[[str, jax.sharding.Sharding | None], Any]) -> PyTree:
    """A tree like `abstract` of what `make` gives for each parameter's name and its place on the mesh, if any."""
    layout = built.model.layout

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        name = tensor_name(path)
        return make(name, None if layout is None else param_sharding(layout, built.rules, name, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, built.abstract)


def tensor_name(path: tuple[Any, ...]) -> str:
    """The checkpoint's name of a parameter, from its path in the tree."""
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _dtype(params: nnx.State):
    """The dtype of activations and caches, which all parameters except int8 matrices have."""
    return next(leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating))
