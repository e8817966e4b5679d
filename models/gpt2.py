"""GPT-2: learned positions, layer norms, biases everywhere, weights stored [in, out]."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from specjax import cache as kv
from specjax.models.family import Architecture, Shape, architecture
from specjax.models.layers import (
    ACTIVATIONS,
    PLAIN,
    Embedding,
    Kinds,
    LayerNorm,
    merge_heads,
    split_heads,
)
from specjax.sharding import Layout, Rules, constrain, fit
from specjax.types import Array, Output

MODEL_TYPES = ("gpt2",)
# The joint qkv projection stays whole: split by output, a device would get queries without their keys.
RULES: Rules = (
    (r"\.attn\.c_proj\.weight", ("query",)),
    (r"\.mlp\.c_fc\.weight", (None, "width")),
    (r"\.mlp\.c_fc\.bias|\.mlp\.c_proj\.weight|\.wte\.|lm_head\.", ("width",)),
)


class GPT2Config(NamedTuple):
    """Hashable: two checkpoints of the same shape share one compiled program."""

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    epsilon: float
    activation: str
    tie_embeddings: bool
    scale_by_layer: bool


def read_config(raw: dict[str, Any]) -> GPT2Config:
    """From the contents of a config.json. Raises ValueError, naming what is missing or unknown."""
    missing = [name for name in ("vocab_size", "n_embd", "n_layer", "n_head") if name not in raw]
    if missing:
        raise ValueError(f"config.json of a gpt2 model lacks {', '.join(missing)}.")
    activation = raw.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation_function {activation!r}; known: {', '.join(ACTIVATIONS)}.")
    if not raw.get("scale_attn_weights", True):
        raise ValueError("scale_attn_weights=false is not supported.")
    return GPT2Config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["n_embd"],
        inner_size=raw.get("n_inner") or 4 * raw["n_embd"],
        num_layers=raw["n_layer"],
        num_heads=raw["n_head"],
        max_positions=raw.get("n_positions", 1024),
        epsilon=float(raw.get("layer_norm_epsilon", 1e-5)),
        activation=activation,
        tie_embeddings=raw.get("tie_word_embeddings", True),
        scale_by_layer=bool(raw.get("scale_attn_by_inverse_layer_idx", False)),
    )


class Attention(nnx.Module):
    """Multi-head attention over the cache and the open block."""

    def __init__(self, config: GPT2Config, layer: int, layout: Layout | None, kinds: Kinds, *, rngs: nnx.Rngs):
        self.c_attn = kinds.conv(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.c_proj = kinds.conv(config.hidden_size, config.hidden_size, rngs=rngs)
        self.head_dim = config.hidden_size // config.num_heads
        self.scale = self.head_dim**-0.5 / (layer + 1 if config.scale_by_layer else 1)
        self.layer = layer
        self.layout = nnx.static(layout)

    def __call__(self, x: Array, cache: kv.KVCache, block: kv.KVBlock, place: kv.Placement):
        query, key, value = (split_heads(part, self.head_dim) for part in jnp.split(self.c_attn(x), 3, -1))
        layer = self.layer
        keys = kv.append(block.keys[layer], key, block.filled)
        values = kv.append(block.values[layer], value, block.filled)
        mixed = kv.attend(
            query, cache.keys[layer], cache.values[layer], keys, values, place, scale=self.scale, layout=self.layout
        )
        return self.c_proj(merge_heads(mixed)), keys, values


class MLP(nnx.Module):
    """project(act(expand(x)))."""

    def __init__(self, config: GPT2Config, kinds: Kinds, *, rngs: nnx.Rngs):
        self.c_fc = kinds.conv(config.hidden_size, config.inner_size, rngs=rngs)
        self.c_proj = kinds.conv(config.inner_size, config.hidden_size, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array) -> Array:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Layer(nnx.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: GPT2Config, layer: int, layout: Layout | None, kinds: Kinds, *, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config.hidden_size, config.epsilon)
        self.attn = Attention(config, layer, layout, kinds, rngs=rngs)
        self.ln_2 = LayerNorm(config.hidden_size, config.epsilon)
        self.mlp = MLP(config, kinds, rngs=rngs)

    def __call__(self, x: Array, *attention_args):
        mixed, keys, values = self.attn(self.ln_1(x), *attention_args)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), keys, values


class Trunk(nnx.Module):
    """Token and position embeddings, layers, final norm."""

    def __init__(self, config: GPT2Config, layout: Layout | None, kinds: Kinds, *, rngs: nnx.Rngs):
        self.wte = kinds.embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.wpe = Embedding(config.max_positions, config.hidden_size, rngs=rngs)
        self.h = nnx.List([Layer(config, layer, layout, kinds, rngs=rngs) for layer in range(config.num_layers)])
        self.ln_f = LayerNorm(config.hidden_size, config.epsilon)


class GPT2(nnx.Module):
    """A whole model; attribute paths are the checkpoint's tensor names."""

    def __init__(self, config: GPT2Config, layout: Layout | None = None, kinds: Kinds = PLAIN, *, rngs: nnx.Rngs):
        self.transformer = Trunk(config, layout, kinds, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_embeddings
            else kinds.linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)
        )
        self.max_positions = config.max_positions
        self.layout = nnx.static(layout)

    def __call__(
        self,
        tokens: Array,
        cache: kv.KVCache,
        block: kv.KVBlock,
        *,
        depths: Array | None = None,
        visible: Array | None = None,
        logits_at: Array | None = None,
        hidden_layers: tuple[int, ...] = (),
    ) -> Output:
        trunk = self.transformer
        width = tokens.shape[1]
        place = kv.place(cache, block, width, depths, visible)
        # Draft tokens may lie past the last position. They are never accepted, but must not read out of range.
        positions = jnp.minimum(place.positions, self.max_positions - 1)
        x = constrain(self.layout, trunk.wte(tokens) + trunk.wpe(positions), "rows")
        outputs, keys, values = [x], [], []
        for layer in trunk.h:
            x, layer_keys, layer_values = layer(x, cache, block, place)
            x = constrain(self.layout, x, "rows")
            outputs.append(x)
            keys.append(layer_keys)
            values.append(layer_values)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], 1)
        head = trunk.wte if self.lm_head is None else self.lm_head
        logits = constrain(self.layout, head.logits(trunk.ln_f(x)), "rows", None, "width")
        appended = kv.KVBlock(tuple(keys), tuple(values), place.block_positions, block.filled + width)
        return Output(logits, tuple(outputs[layer] for layer in hidden_layers), appended)


@functools.cache
def build(config: GPT2Config, vocab_size: int, layout: Layout | None = None, kinds: Kinds = PLAIN) -> Architecture:
    """The architecture of one config; `vocab_size` ids of config.vocab_size columns may be emitted."""
    layout = fit(layout, heads=config.num_heads, query_heads=config.num_heads)
    return architecture(
        lambda rngs: GPT2(config, layout, kinds, rngs=rngs),
        Shape(config.num_layers, config.num_heads, config.hidden_size // config.num_heads),
        vocab_size=vocab_size,
        max_positions=config.max_positions,
        layout=layout,
        rules=RULES,
        prefix="transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
        tied=("lm_head.weight", "transformer.wte.weight") if config.tie_embeddings else None,
    )
