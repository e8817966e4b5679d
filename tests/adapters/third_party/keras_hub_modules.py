"""keras-hub's Llama through the shells of docs/adapters.md, tiny and random, without and with its own cache."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras_hub
from flax import nnx
from recipe import classes
from trial import stirred, try_all

from specjax import adapters

VOCAB = 24
shells = classes("keras")
model = keras_hub.models.LlamaCausalLM(
    backbone=keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCAB, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=32,
        intermediate_dim=48,
    ),
    preprocessor=None,
)  # fmt: skip


def own_logits(params, tokens):
    """Keras's own call with other values of its variables."""
    values = dict(zip((id(variable) for variable in model.variables), jax.tree.leaves(params), strict=True))
    trained, fixed = (
        [values[id(variable)] for variable in group]
        for group in (model.trainable_variables, model.non_trainable_variables)
    )
    inputs = {"token_ids": tokens, "padding_mask": jnp.ones_like(tokens)}
    return model.stateless_call(trained, fixed, inputs, training=False)[0]


for name, shell in (("keras-hub Llama", "Keras"), ("keras-hub Llama in its own cache", "KerasCached")):
    module = shells[shell](model)
    nnx.update(module, stirred(nnx.state(module)))
    try_all(name, ["keras-hub", "keras"], lambda module=module: adapters.from_nnx(module), own_logits)
