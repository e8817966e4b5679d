"""An equinox transformer through the shell of docs/adapters.md, tiny and random."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from recipe import classes
from trial import stirred, try_all

from specjax import adapters

VOCAB, WIDTH, HEADS = 24, 32, 4
Equinox = classes("equinox")["Equinox"]


class Transformer(eqx.Module):
    """One text [T] to its logits [T, VOCAB], by equinox's own layers."""

    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    rope: eqx.nn.RotaryPositionalEmbedding
    norm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout
    mlp: eqx.nn.MLP
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[1])
        self.rope = eqx.nn.RotaryPositionalEmbedding(WIDTH // HEADS)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.dropout = eqx.nn.Dropout(0.5)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 48, depth=1, key=keys[2])
        self.out = eqx.nn.Linear(WIDTH, VOCAB, key=keys[3])

    def __call__(self, tokens):
        def turned(query, key, value):
            return jax.vmap(self.rope, 1, 1)(query), jax.vmap(self.rope, 1, 1)(key), value

        x = jax.vmap(self.embed)(tokens)
        normed, causal = jax.vmap(self.norm)(x), jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        x = x + self.dropout(self.attention(normed, normed, normed, mask=causal, process_heads=turned))
        return jax.vmap(self.out)(x + jax.vmap(self.mlp)(x))


model = eqx.nn.inference_mode(Transformer(jax.random.key(0)))
module = Equinox(model)
nnx.update(module, stirred(nnx.state(module)))
_, form = jax.tree.flatten(eqx.filter(model, eqx.is_array))
rest = eqx.filter(model, eqx.is_array, inverse=True)


def own_logits(params, tokens):
    """The model itself, without the shell's call."""
    own = eqx.combine(jax.tree.unflatten(form, jax.tree.leaves(params)), rest)
    return jax.lax.map(own, tokens)


try_all("equinox transformer", ["equinox"], lambda: adapters.from_nnx(module), own_logits)
