"""Flax modules as other people write them, each with a cache of another kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

VOCAB, WIDTH, HEADS = 11, 16, 2


def _heads(x):
    return x.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)


def _attend(query, keys, values, mask):
    """[B, T, H, D] over [B, S, H, D], mask [B, 1 or H, T, S]."""
    scores = jnp.einsum("bthd,bshd->bhts", query, keys) * (WIDTH // HEADS) ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), -1)
    return jnp.einsum("bhts,bshd->bthd", weights, values).reshape(*query.shape[:2], WIDTH)


def _sines(positions):
    """[B, T, WIDTH]: positions that a model can't mistake for one another."""
    rates = 3.0 ** -jnp.arange(WIDTH // 2, dtype=jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * rates.reshape(1, 1, -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class _Base(nnx.Module):
    """Embedding, one attention layer over whatever keys it is shown, output; what every module here shares."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.query, self.key, self.value = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def inputs(self, tokens, positions):
        return 2.0 * self.embed(tokens) + _sines(positions)

    def logits(self, x, keys, values, mask):
        return 4.0 * self.out(jnp.sin(3.0 * x + 6.0 * _attend(_heads(2.0 * self.query(x)), keys, values, mask)))

    def new(self, x):
        return _heads(2.0 * self.key(x)), _heads(self.value(x))


class SharedCursor(_Base):
    """One cursor for all rows, a mask from outside: the manner of Google's Gemma and of Tunix."""

    def init_cache(self, batch_size, cache_size, dtype):
        shape = (batch_size, cache_size, HEADS, WIDTH // HEADS)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "end": jnp.zeros((batch_size,), jnp.int32)}

    def __call__(self, tokens, positions, cache, attention_mask):
        x = self.inputs(tokens, positions)
        keys, values = self.new(x)
        if cache is not None:
            at = (0, cache["end"][0], 0, 0)
            keys = lax.dynamic_update_slice(cache["k"], keys, at)
            values = lax.dynamic_update_slice(cache["v"], values, at)
            cache = {"k": keys, "v": values, "end": cache["end"] + tokens.shape[1]}
        return self.logits(x, keys, values, attention_mask[:, None]), cache


class RowCursors(_Base):
    """A cursor for each row, and the mask that follows from it."""

    def init_cache(self, batch, length):
        shape = (batch, length, HEADS, WIDTH // HEADS)
        return jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((batch,), jnp.int32)

    def __call__(self, ids, kv_cache):
        keys, values, ends = kv_cache
        places = ends[:, None] + jnp.arange(ids.shape[1])[None]
        x = self.inputs(ids, places)
        new_keys, new_values = self.new(x)
        rows = jnp.arange(ids.shape[0])[:, None]
        keys = keys.at[rows, places].set(new_keys, mode="drop")
        values = values.at[rows, places].set(new_values, mode="drop")
        mask = jnp.arange(keys.shape[1])[None, None] <= places[:, :, None]
        return self.logits(x, keys, values, mask[:, None]), (keys, values, ends + ids.shape[1])


class LoneCursor(_Base):
    """One number for all rows, and the mask that follows from it: nothing from outside can tell rows apart."""

    def init_cache(self, batch_size, max_len):
        shape = (batch_size, max_len, HEADS, WIDTH // HEADS)
        return {"keys": jnp.zeros(shape), "values": jnp.zeros(shape), "cursor": jnp.int32(0)}

    def __call__(self, tokens, cache=None):
        rows, width = tokens.shape
        places = jnp.arange(width) if cache is None else cache["cursor"] + jnp.arange(width)
        x = self.inputs(tokens, jnp.broadcast_to(places[None], (rows, width)))
        keys, values = self.new(x)
        if cache is not None:
            at = (0, cache["cursor"], 0, 0)
            keys = lax.dynamic_update_slice(cache["keys"], keys, at)
            values = lax.dynamic_update_slice(cache["values"], values, at)
            cache = {"keys": keys, "values": values, "cursor": cache["cursor"] + width}
        mask = jnp.arange(keys.shape[1])[None] <= places[:, None]
        return self.logits(x, keys, values, mask[None, None]), cache


class Untold(SharedCursor):
    """An init_cache of arguments that only its author knows."""

    def init_cache(self, config, n):
        return super().init_cache(config["rows"], n, jnp.float32)


class FixedSlots(SharedCursor):
    """Makes as many slots as its configuration says, whatever is asked for."""

    def init_cache(self, batch_size, cache_size):
        del cache_size
        return super().init_cache(batch_size, 100, jnp.float32)


class SlidingBySlot(SharedCursor):
    """A window counted in slots of the cache, as Tunix's Gemma has it: no round may stand anywhere but in its place."""

    def __call__(self, tokens, positions, cache, attention_mask):
        slots = jnp.arange(attention_mask.shape[-1])[None, None]
        near = slots > positions[:, :, None] - 4
        return super().__call__(tokens, positions, cache, attention_mask & near)


class Stack(nnx.Module):
    """Flax's own attention layers, two of them, with a causal mask of its own and dropout; no cache."""

    def __init__(self, rngs, dropout=0.5):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List(
            nnx.MultiHeadAttention(HEADS, WIDTH, dropout_rate=dropout, decode=False, rngs=rngs) for _ in range(2)
        )
        self.out = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = 2.0 * self.embed(tokens) + _sines(place)
        for layer in self.layers:
            x = x + layer(x, mask=nnx.make_causal_mask(tokens))
        return 4.0 * self.out(x)


class Sliced(Stack):
    """Learned positions, added by a slice: past the table's end the shapes no longer fit."""

    def __init__(self, rngs, most=40):
        super().__init__(rngs)
        self.places = nnx.Param(jax.random.normal(rngs.params(), (most, WIDTH)))

    def __call__(self, tokens):
        x = 2.0 * self.embed(tokens) + self.places[: tokens.shape[1]][None]
        for layer in self.layers:
            x = x + layer(x, mask=nnx.make_causal_mask(tokens))
        return 4.0 * self.out(x)


class SquareMask(SharedCursor):
    """Its causal mask lies in a square of fixed size."""

    most = 40

    def __call__(self, tokens, positions, cache, attention_mask):
        square = jnp.tril(jnp.ones((self.most, self.most), bool))
        own = square[positions][:, :, : attention_mask.shape[-1]]
        return super().__call__(tokens, positions, cache, attention_mask | (own & attention_mask))


class OwnVariables(RowCursors):
    """A cache kept in the module's own Variables, as Flax's decode mode does."""

    def __init__(self, rngs, rows=1, slots=1):
        super().__init__(rngs)
        self.keys, self.values, self.ends = (nnx.Cache(array) for array in super().init_cache(rows, slots))

    init_cache = None

    def __call__(self, ids):
        logits, new = super().__call__(ids, (self.keys[...], self.values[...], self.ends[...]))
        self.keys[...], self.values[...], self.ends[...] = new
        return logits


class Flat(linen.Module):
    """Linen: learned positions, Flax's own attention, a mask [B, 1, T, T] from outside; no cache."""

    most: int = 40

    @linen.compact
    def __call__(self, inputs, position_ids, mask, deterministic=False):
        x = 2.0 * linen.Embed(VOCAB, WIDTH)(inputs) + linen.Embed(self.most, WIDTH)(position_ids)
        x = x + linen.MultiHeadDotProductAttention(HEADS, dropout_rate=0.5, deterministic=deterministic)(x, mask=mask)
        return 4.0 * linen.Dense(VOCAB)(x)


class Held(linen.Module):
    """Linen, one cursor for all rows, everything in a tuple, logits last."""

    def init_cache(self, batch, slots):
        shape = (batch, HEADS, slots, WIDTH // HEADS)
        return jnp.zeros(shape), jnp.zeros(shape), jnp.int32(0)

    @linen.compact
    def __call__(self, tokens, segment_pos, cache, attn_mask):
        x = 2.0 * linen.Embed(VOCAB, WIDTH)(tokens) + _sines(segment_pos)
        keys, values = (_heads(2.0 * linen.Dense(WIDTH)(x)).swapaxes(1, 2) for _ in range(2))
        if cache is not None:
            old_keys, old_values, end = cache
            keys = lax.dynamic_update_slice(old_keys, keys, (0, 0, end, 0))
            values = lax.dynamic_update_slice(old_values, values, (0, 0, end, 0))
            cache = (keys, values, end + tokens.shape[1])
        query = _heads(2.0 * linen.Dense(WIDTH)(x))
        mixed = _attend(query, keys.swapaxes(1, 2), values.swapaxes(1, 2), attn_mask)
        return cache, 4.0 * linen.Dense(VOCAB)(jnp.sin(3.0 * x + 6.0 * mixed))


class Mixing(Stack):
    def __call__(self, tokens):
        logits = super().__call__(tokens)
        return logits - jnp.mean(logits, 0, keepdims=True)


class Bidirectional(Stack):
    def __call__(self, tokens):
        logits = super().__call__(tokens)
        return logits + jnp.sum(logits, 1, keepdims=True)


class Blind(Stack):
    def __call__(self, tokens):
        return self.out(self.embed(tokens))


class Broken(Stack):
    def __call__(self, tokens):
        return super().__call__(tokens) * jnp.nan


class NoLogits(Stack):
    def __call__(self, tokens):
        return jnp.mean(super().__call__(tokens), 1)


class Vision(Stack):
    def __call__(self, tokens, images):
        return super().__call__(tokens) + images


class Loud(Stack):
    def eval(self, **attributes):
        """Stays in training mode."""
        self.train()


class Fails(Stack):
    def __call__(self, tokens):
        raise RuntimeError("out of luck")


class Table(LoneCursor):
    """Learned positions, counted from its own cursor."""

    def __init__(self, rngs, most=40):
        super().__init__(rngs)
        self.places = nnx.Embed(most, WIDTH, rngs=rngs)

    def inputs(self, tokens, positions):
        return 2.0 * self.embed(tokens) + self.places(positions)


class Faint(SlidingBySlot):
    """Attention counts for little, so that a wrong cache changes little."""

    def logits(self, x, keys, values, mask):
        return 4.0 * self.out(x + 0.1 * _attend(_heads(2.0 * self.query(x)), keys, values, mask))
