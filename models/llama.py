"""The Llama family in one module: Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM; the config says what differs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from specjax import cache as kv
from specjax.models import rope
from specjax.models.family import Architecture, Shape, architecture
from specjax.models.layers import ACTIVATIONS, PLAIN, Kinds, RMSNorm, merge_heads, split_heads
from specjax.sharding import Layout, Rules, constrain, fit
from specjax.types import Array, Output

# Megatron's split (arXiv:1909.08053): the first product by output, the second by input; two all-reduces a layer.
RULES: Rules = (
    (r"\.(k|v)_proj\.", ("heads",)),
    (r"\.q_proj\.", ("query",)),
    (r"\.o_proj\.weight", (None, "query")),
    (r"\.down_proj\.weight", (None, "width")),
    (r"\.(gate|up)_proj\.|embed_tokens\.|lm_head\.", ("width",)),
)


class LlamaConfig(NamedTuple):
    """Hashable: two checkpoints of the same shape share one compiled program."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: rope.Rope
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    activation: str
    windows: tuple[int | None, ...]  # sliding window of each layer


# What the transformers config classes assume where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
_NULL_IS_A_VALUE = ("sliding_window", "num_key_value_heads")  # no window; one for each query head
MODEL_TYPES = tuple(_DEFAULTS)


def read_config(raw: dict[str, Any]) -> LlamaConfig:
    """From the contents of a config.json. Raises ValueError, naming what is missing or unknown."""
    kind = raw["model_type"]
    given = {name: value for name, value in raw.items() if value is not None or name in _NULL_IS_A_VALUE}
    config = {**_DEFAULTS[kind], **given}
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"config.json of a {kind} model lacks {', '.join(missing)}.")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown hidden_act {activation!r}; known: {', '.join(ACTIVATIONS)}.")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    bias = bool(config.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope.from_config(config, head_dim),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias and kind != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        activation=activation,
        windows=_windows(kind, config),
    )


def _windows(kind: str, config: dict[str, Any]) -> tuple[int | None, ...]:
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if kind == "mistral":
        return (window,) * layers
    if not kind.startswith("qwen") or not config.get("use_sliding_window", False):
        return (None,) * layers
    if "layer_types" in config:
        return tuple(window if name == "sliding_attention" else None for name in config["layer_types"])
    return tuple(window if layer >= config["max_window_layers"] else None for layer in range(layers))


class Attention(nnx.Module):
    """Grouped-query attention over the cache and the open block."""

    def __init__(self, config: LlamaConfig, layer: int, layout: Layout | None, kinds: Kinds, *, rngs: nnx.Rngs):
        width, head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_kv_heads * head_dim
        self.q_proj = kinds.linear(width, config.num_heads * head_dim, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = kinds.linear(width, kv_width, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = kinds.linear(width, kv_width, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = kinds.linear(config.num_heads * head_dim, width, bias=config.out_bias, rngs=rngs)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.head_dim = head_dim
        self.layer = layer
        self.window = config.windows[layer]
        self.layout = nnx.static(layout)

    def __call__(self, x: Array, cos: Array, sin: Array, cache: kv.KVCache, block: kv.KVBlock, place: kv.Placement):
        query = split_heads(self.q_proj(x), self.head_dim)
        key = split_heads(self.k_proj(x), self.head_dim)
        value = split_heads(self.v_proj(x), self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        layer = self.layer
        keys = kv.append(block.keys[layer], rope.rotate(key, cos, sin), block.filled)
        values = kv.append(block.values[layer], value, block.filled)
        mixed = kv.attend(
            rope.rotate(query, cos, sin), cache.keys[layer], cache.values[layer], keys, values, place,
            scale=self.head_dim**-0.5, window=self.window, layout=self.layout,
        )  # fmt: skip
        return self.o_proj(merge_heads(mixed)), keys, values


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, kinds: Kinds, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = kinds.linear(width, inner, bias=config.mlp_bias, rngs=rngs)
        self.up_proj = kinds.linear(width, inner, bias=config.mlp_bias, rngs=rngs)
        self.down_proj = kinds.linear(inner, width, bias=config.mlp_bias, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array) -> Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, layer: int, layout: Layout | None, kinds: Kinds, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, layout, kinds, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, kinds, rngs=rngs)

    def __call__(self, x: Array, *attention_args):
        mixed, keys, values = self.self_attn(self.input_layernorm(x), *attention_args)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Trunk(nnx.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: LlamaConfig, layout: Layout | None, kinds: Kinds, *, rngs: nnx.Rngs):
        self.embed_tokens = kinds.embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Layer(config, layer, layout, kinds, rngs=rngs) for layer in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nnx.Module):
    """A whole model; attribute paths are the checkpoint's tensor names."""

    def __init__(self, config: LlamaConfig, layout: Layout | None = None, kinds: Kinds = PLAIN, *, rngs: nnx.Rngs):
        self.model = Trunk(config, layout, kinds, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_embeddings
            else kinds.linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)
        )
        self.rope = config.rope
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
        width = tokens.shape[1]
        place = kv.place(cache, block, width, depths, visible)
        cos, sin = rope.angles(self.rope, place.positions)
        x = constrain(self.layout, self.model.embed_tokens(tokens), "rows")
        outputs, keys, values = [x], [], []
        for layer in self.model.layers:
            x, layer_keys, layer_values = layer(x, cos, sin, cache, block, place)
            x = constrain(self.layout, x, "rows")
            outputs.append(x)
            keys.append(layer_keys)
            values.append(layer_values)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], 1)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits = constrain(self.layout, head.logits(self.model.norm(x)), "rows", None, "width")
        appended = kv.KVBlock(tuple(keys), tuple(values), place.block_positions, block.filled + width)
        return Output(logits, tuple(outputs[layer] for layer in hidden_layers), appended)


@functools.cache
def build(config: LlamaConfig, vocab_size: int, layout: Layout | None = None, kinds: Kinds = PLAIN) -> Architecture:
    """The architecture of one config; `vocab_size` ids of config.vocab_size columns may be emitted."""
    layout = fit(layout, heads=config.num_kv_heads, query_heads=config.num_heads)
    return architecture(
        lambda rngs: Llama(config, layout, kinds, rngs=rngs),
        Shape(config.num_layers, config.num_kv_heads, config.head_dim),
        vocab_size=vocab_size,
        max_positions=config.rope.max_positions,
        layout=layout,
        rules=RULES,
        prefix="model.",
        ignored=("rotary_emb.inv_freq",),
        tied=("lm_head.weight", "model.embed_tokens.weight") if config.tie_embeddings else None,
    )
