"""A Llama as many people write one in Flax NNX, with a cache of its own: what `benchmarks/adapters.py` adapts.

It knows nothing of specjax. Positions, cache and mask are arguments; each row of the cache has its cursor.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax.models import Loaded


class Layer(nnx.Module):
    """Attention over the cache, then a gated MLP."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads, inner = (
            config[name] for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        )

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.q_proj = linear(width, heads * self.head_dim)
        self.k_proj, self.v_proj = (linear(width, kv_heads * self.head_dim) for _ in range(2))
        self.o_proj = linear(heads * self.head_dim, width)
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), linear(inner, width)
        self.input_layernorm, self.post_attention_layernorm = (
            nnx.RMSNorm(width, epsilon=config["rms_norm_eps"], rngs=rngs) for _ in range(2)
        )

    def __call__(self, x, positions, cache, mask):
        """One layer; gives the new hidden states and the layer's cache."""
        normed = self.input_layernorm(x)
        query, key, value = (
            layer(normed).reshape(*x.shape[:2], -1, self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotated(query, positions), _rotated(key, positions)
        if cache is not None:
            write = jax.vmap(lambda buffer, new, at: jax.lax.dynamic_update_slice_in_dim(buffer, new, at, 0))
            key, value = write(cache["k"], key, cache["end"]), write(cache["v"], value, cache["end"])
            cache = {"k": key, "v": value, "end": cache["end"] + x.shape[1]}
        x = x + self.o_proj(jax.nn.dot_product_attention(query, key, value, mask=mask[:, None]).reshape(x.shape))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(normed)) * self.up_proj(normed)), cache


class FlaxLlama(nnx.Module):
    """Embedding, layers, norm; the output layer is the embedding."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
        self.cache_shape = (config["num_key_value_heads"], config["head_dim"])
        self.embed_tokens = nnx.Embed(config["vocab_size"], config["hidden_size"], rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])
        self.norm = nnx.RMSNorm(config["hidden_size"], epsilon=config["rms_norm_eps"], rngs=rngs)

    def init_cache(self, batch_size: int, cache_size: int, dtype: Any) -> list[dict[str, jax.Array]]:
        """An empty cache."""
        empty = jnp.zeros((batch_size, cache_size, *self.cache_shape), dtype)
        return [{"k": empty, "v": empty, "end": jnp.zeros((batch_size,), jnp.int32)} for _ in self.layers]

    def __call__(self, tokens, positions, cache, attention_mask):
        """Logits and the cache."""
        x, new = self.embed_tokens(tokens), []
        for layer, part in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x, part = layer(x, positions, part, attention_mask)
            new.append(part)
        return self.embed_tokens.attend(self.norm(x)), new if cache else None


def with_weights_of(loaded: Loaded, config: dict[str, Any]) -> FlaxLlama:
    """The same network with a checkpoint's weights."""
    module: Any = FlaxLlama(config, nnx.Rngs(0))
    given = {
        tuple(str(getattr(key, "key", "")) for key in path if getattr(key, "key", None) not in (None, "model")): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params)
    }
    module.embed_tokens.embedding[...] = given["embed_tokens", "weight"]
    module.norm.scale[...] = given["norm", "weight"]
    for index, layer in enumerate(module.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer, name).kernel[...] = given["layers", str(index), "self_attn", name, "weight"].T
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer, name).kernel[...] = given["layers", str(index), "mlp", name, "weight"].T
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, name).scale[...] = given["layers", str(index), name, "weight"]
    return module


def _rotated(x, positions):
    """Rotary embeddings over the two halves of each head."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * rates[None, None, None]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate(
        [first * jnp.cos(angles) - second * jnp.sin(angles), second * jnp.cos(angles) + first * jnp.sin(angles)], -1
    )
