"""Exact distributions by enumeration in float64 NumPy, and a test of counts against them with a known error rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from specjax.types import Model, Processor, PyTree, Sampling

_MOST_TEXTS = 100_000


def numpy_probs(
    logits: np.ndarray,
    sampling: Sampling,
    *,
    text: Sequence[int] = (),
    prompt_length: int = 0,
    stop_tokens: Sequence[int] = (),
    processor: Processor | None = None,
) -> np.ndarray:
    """The probabilities [V] that specjax should compute from the logits [V] of one place, in float64, by sorting.

    All are zero if no token is allowed.

    Args:
      logits: [V], padding columns left out.
      sampling: scalar fields, or None; `logit_bias` [V].
      text: the ids before this place, the prompt included.
      prompt_length: how many of them are the prompt.
      stop_tokens: what `min_new_tokens` forbids.
      processor: called with a buffer of len(text) + 4.
    """
    logits = _adjusted(np.asarray(logits, np.float64), sampling, list(text), prompt_length, stop_tokens, processor)
    if logits.max() == -np.inf:
        return np.zeros(len(logits))
    temperature, top_k, top_p, min_p = (float(value) for value in sampling[:4])
    if temperature <= 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    scaled = logits / temperature
    if 0 < top_k < len(scaled):
        scaled = np.where(scaled >= np.sort(scaled)[-int(top_k)], scaled, -np.inf)
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        last = int(np.searchsorted(np.cumsum(probs[order]), top_p))
        probs = np.where(probs >= probs[order[min(last, len(probs) - 1)]], probs, 0.0)
    probs = np.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


def _adjusted(logits, sampling: Sampling, text: list[int], prompt_length: int, stop_tokens, processor) -> np.ndarray:
    generated = np.bincount(text[prompt_length:], minlength=len(logits)).astype(float)
    seen = np.bincount(text, minlength=len(logits)) > 0
    if sampling.repetition_penalty is not None:
        penalty = float(sampling.repetition_penalty)
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - _number(sampling.frequency_penalty) * generated
    logits = logits - _number(sampling.presence_penalty) * (generated > 0)
    if sampling.logit_bias is not None:
        logits = logits + np.asarray(sampling.logit_bias, np.float64)
    forbidden = [int(word) for word in np.ravel([] if sampling.bad_words is None else np.asarray(sampling.bad_words))]
    if len(text) - prompt_length < _number(sampling.min_new_tokens):
        forbidden += stop_tokens
    logits = logits.copy()
    logits[[word for word in forbidden if word >= 0]] = -np.inf
    if processor is not None:
        tokens = jnp.asarray(text + [-1] * 4, jnp.int32)
        logits = np.asarray(processor(jnp.asarray(logits, jnp.float32), tokens, jnp.int32(len(text))), np.float64)
    return logits


def exact_sequence_probs(
    model: Model,
    params: PyTree,
    prompt: Sequence[int],
    length: int,
    *,
    sampling: Sampling,
    stop_tokens: Sequence[int] = (),
    processor: Processor | None = None,
) -> np.ndarray:
    """The probability of every continuation of up to `length` tokens, by enumeration in float64.

    The model scores all vocab_size ** (length - 1) texts in one forward pass with an empty cache, and `numpy_probs`
    turns its logits into probabilities. So keep the vocabulary to a few ids.

    Args:
      model, params: of the target.
      prompt: ids, at least one.
      length: tokens to enumerate.
      sampling: scalar fields, or None; `logit_bias` [V].
      stop_tokens: ids that end a text.
      processor: as in `generate`.

    Returns:
      [vocab_size] * length float64; entry [a, b, c] is the probability of emitting a, then b, then c. After a stop
      token the other indices are 0, as `Generation.tokens` is padded. The sum is less than 1 if texts reach a place
      where no token is allowed.
    """
    vocab_size, prompt = model.vocab_size, list(prompt)
    if not prompt or length < 1 or vocab_size ** (length - 1) > _MOST_TEXTS:
        raise ValueError(
            f"needs a prompt, length 1 or more and at most {_MOST_TEXTS} texts to score: got {len(prompt)} ids, length "
            f"{length} and {vocab_size} ids to choose from. Take a smaller vocabulary or length."
        )
    paths = np.array(list(itertools.product(range(vocab_size), repeat=length - 1)), np.int32).reshape(-1, length - 1)
    texts = np.concatenate([np.tile(np.array([prompt], np.int32), (len(paths), 1)), paths], 1)
    count, width = texts.shape
    cache, block = model.init_cache(params, count, width + 1), model.init_block(params, count, width)
    logits = np.asarray(jax.jit(model.apply)(params, texts, cache, block).logits[..., :vocab_size], np.float64)
    probs = np.zeros((vocab_size,) * length)

    def extend(new: tuple[int, ...], prob: float) -> None:
        rest = length - len(new)
        if rest == 0 or (new and new[-1] in stop_tokens):
            probs[new + (0,) * rest] += prob
            return
        row = np.ravel_multi_index(new + (0,) * (rest - 1), (vocab_size,) * (length - 1)) if length > 1 else 0
        options: dict[str, Any] = {"stop_tokens": list(stop_tokens), "processor": processor}
        place = logits[row, len(prompt) - 1 + len(new)]
        after = numpy_probs(place, sampling, text=[*prompt, *new], prompt_length=len(prompt), **options)
        for token in np.flatnonzero(after):
            extend((*new, int(token)), prob * after[token])

    extend((), 1.0)
    return probs


def count_sequences(tokens: ArrayLike, prompt_length: int, length: int, vocab_size: int) -> np.ndarray:
    """How often each continuation of `length` tokens occurs: [vocab_size] * length, from Generation.tokens [B, C]."""
    if (np.asarray(tokens) >= vocab_size).any():
        raise ValueError(f"tokens holds {np.max(tokens)}, outside the vocabulary 0..{vocab_size - 1}.")
    counts = np.zeros((vocab_size,) * length)
    np.add.at(counts, tuple(np.asarray(tokens)[:, prompt_length : prompt_length + length].T), 1)
    return counts


def assert_same_distribution(counts: np.ndarray, probs: np.ndarray, *, false_alarm: float = 1e-6) -> None:
    """Fails unless `counts` could come from `probs`: a chi-square test whose false-alarm rate is at most `false_alarm`.

    Cells with fewer than 5 expected counts are pooled. The threshold is the bound of Laurent and Massart (2000),
    lemma 1: a chi-square of d degrees exceeds d + 2 sqrt(d x) + 2 x with probability at most exp(-x).

    Raises:
      AssertionError: with the statistic, the threshold and the worst cells.
    """
    counts, probs = np.asarray(counts, np.float64).ravel(), np.asarray(probs, np.float64).ravel()
    if counts.shape != probs.shape:
        raise AssertionError(f"counts has {counts.size} cells, the distribution {probs.size}")
    if counts.sum() == 0 or not 0 < probs.sum() < 1 + 1e-6:
        total = probs.sum()
        raise AssertionError(
            f"{int(counts.sum())} samples and probabilities that sum to {total:.3f}: nothing to compare"
        )
    impossible = counts[probs == 0]
    if impossible.any():
        raise AssertionError(f"{int(impossible.sum())} samples have probability 0 under the distribution")
    expected = probs * counts.sum()
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


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)
