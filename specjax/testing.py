"""The exactness kit: models whose law is a small table, drafters that try to break a verifier, and an exact law to
compare with. For specjax's own tests, and for anyone who writes a drafter or a verifier.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.types import Array, Model, Output


class TableCache(NamedTuple):
    """The last tokens of each row, all that a table looks at."""

    history: Array  # [B, order] int32, newest last; vocab_size stands for "before the text"
    lengths: Array  # [B] int32


class TableBlock(NamedTuple):
    """Tokens not yet committed."""

    tokens: Array  # [B, N] int32
    depths: Array  # [B, N] int32
    filled: Array  # [] int32


@functools.cache
def table_model(order: int, vocab_size: int, logits_size: int | None = None) -> Model:
    """A Model whose next-token logits are a table over the last `order` tokens.

    Its parameters are the table, [vocab_size + 1] * order + [logits_size] float32 (see `random_table`), where index
    vocab_size stands for the time before the text. Small enough to enumerate, and tree-capable like any Model.

    Args:
      order: tokens of context, 1 or more.
      vocab_size: ids that may be emitted.
      logits_size: columns of the logits, at least vocab_size; more makes a padded vocabulary.
    """
    del logits_size  # the table's own shape says it; here for a distinct Model per padding

    def init_cache(params: Array, batch: int, slots: int) -> TableCache:
        del params, slots
        return TableCache(jnp.full((batch, order), vocab_size, jnp.int32), jnp.zeros((batch,), jnp.int32))

    def init_block(params: Array, batch: int, size: int) -> TableBlock:
        del params
        empty = jnp.zeros((batch, size), jnp.int32)
        return TableBlock(empty, empty, jnp.int32(0))

    def apply(params, tokens, cache, block, *, depths=None, visible=None, logits_at=None, hidden_layers=()) -> Output:
        batch, width = tokens.shape
        size = block.tokens.shape[1]
        steps = block.filled + jnp.arange(width) if depths is None else depths
        steps = jnp.broadcast_to(steps[None] if steps.ndim == 1 else steps, (batch, width))
        appended = TableBlock(
            lax.dynamic_update_slice_in_dim(block.tokens, tokens, block.filled, 1),
            lax.dynamic_update_slice_in_dim(block.depths, steps, block.filled, 1),
            block.filled + width,
        )
        if visible is None:
            visible = jnp.arange(size)[None] <= (block.filled + jnp.arange(width))[:, None]
        visible = jnp.broadcast_to(visible[None] if visible.ndim == 2 else visible, (batch, width, size))
        columns = [_ancestor(cache, appended, steps, visible, back) for back in range(order - 1, -1, -1)]
        logits = params[tuple(columns)].astype(jnp.float32)
        if logits_at is not None:
            logits = jnp.take_along_axis(logits, logits_at[..., None], 1)
        hidden = tuple(jax.nn.one_hot(tokens, vocab_size) for _ in hidden_layers)
        return Output(logits, hidden, appended)

    def commit(cache: TableCache, block: TableBlock, keep: Array, path: Array | None = None) -> TableCache:
        tokens = block.tokens if path is None else jnp.take_along_axis(block.tokens, path, 1)
        text = jnp.concatenate([cache.history, tokens], 1)
        newest = keep[:, None] + jnp.arange(order)[None]
        return TableCache(jnp.take_along_axis(text, newest, 1), cache.lengths + keep)

    return Model(apply, init_cache, init_block, commit, vocab_size)


def _ancestor(cache: TableCache, block: TableBlock, depths: Array, visible: Array, back: int) -> Array:
    """[B, T]: the token `back` steps before each new one, found in the block or else in the cache."""
    wanted = (depths - back)[:, :, None]  # [B, T, 1]
    is_it = visible & (block.depths[:, None, :] == wanted)
    in_block = jnp.take_along_axis(block.tokens, jnp.argmax(is_it, -1), 1)
    order = cache.history.shape[1]
    in_cache = jnp.take_along_axis(cache.history, jnp.clip(order + wanted[..., 0], 0, order - 1), 1)
    return jnp.where(wanted[..., 0] >= 0, in_block, in_cache)


def random_table(
    key: Array, *, order: int, vocab_size: int, logits_size: int | None = None, sharpness: float = 1.0
) -> Array:
    """Parameters for `table_model`: standard normal logits times `sharpness`."""
    shape = (vocab_size + 1,) * order + (logits_size or vocab_size,)
    return sharpness * jax.random.normal(key, shape)


class Adversary(NamedTuple):
    """A drafter's table made to be hard on a verifier."""

    name: str
    table: Array


def adversarial_tables(table: Array, vocab_size: int) -> list[Adversary]:
    """Draft tables for a target `table`: uniform, reversed (likely becomes unlikely), one-hot at the least likely
    token, near-zero overlap, and a sharpened copy."""
    worst = jax.nn.one_hot(jnp.argmin(table[..., :vocab_size], -1), table.shape[-1])
    best = jax.nn.one_hot(jnp.argmax(table[..., :vocab_size], -1), table.shape[-1])
    return [
        Adversary("uniform", jnp.zeros_like(table)),
        Adversary("reversed", -table),
        Adversary("one-hot at the worst", jnp.where(worst > 0, 60.0, 0.0)),
        Adversary("near-zero overlap", jnp.where(best > 0, -20.0, 0.0)),
        Adversary("sharpened", 3.0 * table),
    ]


def numpy_law(
    logits: np.ndarray, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The law that `specjax.sampling` should make of one row of logits, in float64, by sorting. [V] -> [V]."""
    logits = np.asarray(logits, np.float64)
    if temperature <= 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    scaled = logits / temperature
    if 0 < top_k < len(scaled):
        scaled = np.where(scaled >= np.sort(scaled)[-top_k], scaled, -np.inf)
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        last = int(np.searchsorted(np.cumsum(probs[order]), top_p))
        probs = np.where(probs >= probs[order[min(last, len(probs) - 1)]], probs, 0.0)
    probs = np.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


def exact_sequence_law(table: Array, prompt: Iterable[int], length: int, vocab_size: int, **sampling) -> np.ndarray:
    """The probability of every continuation of `length` tokens under a table model, by enumeration in float64.

    Returns:
      [vocab_size] * length float64; entry [a, b, c] is the probability of emitting a, then b, then c.
    """
    host = np.asarray(table, np.float64)
    order = host.ndim - 1
    before = [vocab_size] * order + list(prompt)
    law = np.zeros((vocab_size,) * length)
    for sequence in itertools.product(range(vocab_size), repeat=length):
        text, prob = list(before), 1.0
        for token in sequence:
            prob *= numpy_law(host[tuple(text[-order:])][:vocab_size], **sampling)[token]
            text.append(token)
        law[sequence] = prob
    return law


def assert_same_law(counts: np.ndarray, law: np.ndarray, *, false_alarm: float = 1e-6) -> None:
    """Fails unless `counts` could come from `law`: a chi-square test whose false-alarm rate is at most `false_alarm`.

    Cells with fewer than 5 expected counts are pooled. The threshold is the bound of Laurent and Massart (2000),
    lemma 1: a chi-square of d degrees exceeds d + 2 sqrt(d x) + 2 x with probability at most exp(-x).

    Raises:
      AssertionError: with the statistic, the threshold and the worst cells.
    """
    counts, law = np.asarray(counts, np.float64).ravel(), np.asarray(law, np.float64).ravel()
    if counts.shape != law.shape:
        raise AssertionError(f"counts has {counts.size} cells, the law {law.size}")
    impossible = counts[law == 0]
    if impossible.any():
        raise AssertionError(f"{int(impossible.sum())} samples have probability 0 under the law")
    expected = law * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    used = wanted > 0
    terms = (observed[used] - wanted[used]) ** 2 / wanted[used]
    degrees, x = max(int(used.sum()) - 1, 1), -math.log(false_alarm)
    threshold = degrees + 2 * math.sqrt(degrees * x) + 2 * x
    if terms.sum() > threshold:
        raise AssertionError(
            f"chi-square {terms.sum():.1f} over {degrees} degrees exceeds {threshold:.1f} "
            f"(false alarms: {false_alarm:g}, {int(counts.sum())} samples); worst cell: {terms.max():.1f}"
        )
