"""Google's gemma package (Linen): Gemma 2 and Gemma 3 text transformers, as installed, tiny and random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from gemma import gm
from gemma.gm.nn import _config, _modules
from trial import stirred, try_all

from specjax import adapters

VOCAB = 24
KINDS = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL)
WIDTHS = {
    "num_embed": VOCAB, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2,
    "attention_types": KINDS, "sliding_window_size": 4, "use_post_attn_norm": True, "use_post_ffw_norm": True,
}  # fmt: skip
CONFIGS = {
    "Gemma 2": _config.TransformerConfig(**WIDTHS, final_logit_softcap=30.0, attn_logits_soft_cap=50.0),
    "Gemma 3": _config.TransformerConfig(**WIDTHS, final_logit_softcap=None, use_qk_norm=True),
}

for name, config in CONFIGS.items():
    module = gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="tokens")
    variables = stirred(module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))

    def own_logits(params, tokens, module=module):
        # Left to itself the module takes id 0 for padding, which in a vocabulary of 24 is a word like any other.
        rows, width = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(width), (rows, width))
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (rows, width, width))
        return module.apply(params, tokens, positions=positions, attention_mask=causal).logits

    try_all(
        f"gemma {name}",
        ["gemma"],
        lambda module=module, variables=variables: adapters.from_linen(module, variables),
        own_logits,
    )
