"""Tiny random models, sharp enough that their distributions are far from uniform."""

from __future__ import annotations

import functools

import jax

from specjax import models, testing

VOCAB = 13
_CONFIGS = {
    "llama": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}  # fmt: skip


def config(family, vocab_size=VOCAB, **changes):
    """The contents of a config.json."""
    return {**_CONFIGS[family], "vocab_size": vocab_size, **changes}


@functools.cache  # one Model, so that tests share its compiled programs
def model(family, seed=0, vocab_size=VOCAB, **changes):
    """(Model, params) of a family, or of a table over two tokens."""
    key = jax.random.key(seed)
    if family == "table":
        return testing.table_model(2, vocab_size), testing.random_table(key, order=2, vocab_size=vocab_size)
    loaded = models.random(config(family, vocab_size, **changes), key)
    scale = {"llama": 12, "gpt2": 9}[family]
    return loaded.model, jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, loaded.params)
