"""google-tunix's Llama 3, Qwen 2, Qwen 3, Gemma and Gemma 3 modules (NNX), as installed, tiny and random."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from trial import stirred, try_all
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

from specjax import adapters

VOCAB = 24
WIDTHS = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
QWEN = {**WIDTHS, "vocab_size": VOCAB, "norm_eps": 1e-6, "rope_theta": 10_000}


def own_cache(batch, slots):
    """What Tunix's sampler makes for modules without an init_cache of their own."""
    shape = (batch, slots, WIDTHS["num_kv_heads"], WIDTHS["head_dim"])
    return {
        f"layer_{layer}": {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros((batch,), jnp.int32)}
        for layer in range(WIDTHS["num_layers"])
    }


def gemma_config(kind, **options):
    kinds = (kind.LOCAL_SLIDING, kind.GLOBAL)
    return gemma.ModelConfig(
        **WIDTHS, num_embed=VOCAB, final_logit_softcap=30.0, use_post_attn_norm=True, use_post_ffw_norm=True,
        attention_types=kinds, attn_logits_soft_cap=50.0, sliding_window_size=4, **options,
    )  # fmt: skip


MODULES = {
    "Llama3": lambda rngs: llama3.Llama3(
        llama3.ModelConfig(**WIDTHS, vocab_size=VOCAB, norm_eps=1e-5, rope_theta=10_000, weight_tying=False), rngs=rngs
    ),
    "Qwen2": lambda rngs: qwen2.Qwen2(qwen2.ModelConfig(**QWEN), rngs=rngs),
    "Qwen3": lambda rngs: qwen3.Qwen3(qwen3.ModelConfig(**QWEN, dtype=jnp.float32, param_dtype=jnp.float32), rngs=rngs),
    "Gemma 2 (local and global layers)": lambda rngs: gemma.Gemma(gemma_config(gemma.AttentionType), rngs=rngs),
    "Gemma 3": lambda rngs: gemma3.Gemma3(
        gemma3.ModelConfig(**WIDTHS, num_embed=VOCAB, sliding_window_size=4, param_dtype=jnp.float32), rngs=rngs
    ),
}

for name, make in MODULES.items():
    module = make(nnx.Rngs(0))
    nnx.update(module, stirred(nnx.state(module)))
    graph, _ = nnx.split(module)

    def own_logits(params, tokens, graph=graph):
        rows, width = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(width), (rows, width))
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (rows, width, width))
        return nnx.merge(graph, params)(tokens, positions, None, causal)[0]

    options = {} if hasattr(module, "init_cache") else {"init_cache": own_cache}
    try_all(
        f"google-tunix {name}",
        ["google-tunix"],
        lambda module=module, options=options: adapters.from_nnx(module, **options),
        own_logits,
    )
