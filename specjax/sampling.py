"""From logits to a distribution: temperature, top-k, top-p and min-p, per row, traced, without sorting the vocabulary.

Draft and target use the same functions, so a token is verified against the distribution that it was drawn from. The
order is that of Hugging Face: the steps of processors.py, then temperature, top-k, top-p, min-p. Ties at a threshold
are all kept (a sort would keep an arbitrary one).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from specjax import noise
from specjax.processors import Before, adjust, without_padding
from specjax.types import Array, Process, Processor, Rows, RowSampling, Sampling

_NOTHING = -jnp.inf


def per_row(sampling: Sampling, batch: int) -> RowSampling:
    """Every field, broadcast to the rows."""

    def spread(value, dtype) -> Array:
        return jnp.broadcast_to(jnp.asarray(value, dtype), (batch,))

    def maybe(value, dtype) -> Array | None:
        return None if value is None else spread(value, dtype)

    bias, words = sampling.logit_bias, sampling.bad_words
    if words is not None:
        words = jnp.asarray(words, jnp.int32)
        words = jnp.broadcast_to(words, (batch, words.shape[-1]))
    return RowSampling(
        temperature=spread(sampling.temperature, jnp.float32),
        top_k=spread(sampling.top_k, jnp.int32),
        top_p=spread(sampling.top_p, jnp.float32),
        min_p=spread(sampling.min_p, jnp.float32),
        repetition_penalty=maybe(sampling.repetition_penalty, jnp.float32),
        presence_penalty=maybe(sampling.presence_penalty, jnp.float32),
        frequency_penalty=maybe(sampling.frequency_penalty, jnp.float32),
        logit_bias=None if bias is None else jnp.atleast_2d(jnp.asarray(bias, jnp.float32)),
        bad_words=words,
        min_new_tokens=maybe(sampling.min_new_tokens, jnp.int32),
    )


def processing(rows: Rows, processor: Processor | None, vocab_size: int) -> Process:
    """The function from logits to processed logits of these rows, for draft and target alike; see `types.Process`."""

    return Partial(functools.partial(_process_of, processor, vocab_size), rows)


def _process_of(
    processor: Processor | None,
    vocab_size: int,
    rows: Rows,
    logits: Array,
    drafted: Array,
    visible: Array,
    depths: Array | None = None,
) -> Array:
    depths = jnp.arange(drafted.shape[1])[None] if depths is None else depths
    adjusted = adjust(logits, Before(rows, drafted, visible, depths), processor, vocab_size)
    return process(adjusted, rows.sampling, vocab_size)


def process(logits: Array, sampling: RowSampling, vocab_size: int) -> Array:
    """Log-weights of the distribution to sample from; `jax.nn.softmax` of the result is that distribution.

    Args:
      logits: [B, T, V] float32; columns from vocab_size on are padding and can never be drawn.
      sampling: fields [B]. A temperature of 0 or below is greedy: all weight on the (first) largest logit.
      vocab_size: number of ids that may be emitted.

    Returns:
      [B, T, V] float32; -inf where the distribution is zero.

    >>> from specjax.types import Sampling
    >>> logits = jnp.log(jnp.array([[[0.4, 0.4, 0.1, 0.1]]]))
    >>> rows = per_row(Sampling(temperature=1.0, top_k=2), 1)
    >>> jax.nn.softmax(process(logits, rows, 4)).round(3).tolist()
    [[[0.5, 0.5, 0.0, 0.0]]]
    """
    width = logits.shape[-1]
    logits = without_padding(logits, vocab_size)
    temperature = jnp.asarray(sampling.temperature)[:, None, None]
    is_sampled = temperature > 0
    best = first_best(logits)[..., None]
    # Where all logits are -inf, or one is NaN or +inf, no token can be chosen: the row ends there.
    has_choice = jnp.isfinite(jnp.max(logits, -1, keepdims=True))
    greedy = jnp.where((_columns(width) == best) & has_choice, 0.0, _NOTHING)

    def sampled() -> Array:
        scaled = logits / jnp.where(is_sampled, temperature, 1.0)
        is_filtered = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        filtered = lax.cond(jnp.any(is_filtered), lambda: _filter(scaled, sampling), lambda: scaled)
        return jnp.where(is_sampled, filtered, greedy)

    return lax.cond(jnp.any(is_sampled), sampled, lambda: greedy)


def sample(keys: Array, logits: Array, sampling: RowSampling) -> Array:
    """One token per row from processed logits [B, V], by the Gumbel-max rule; [B] int32. Greedy rows draw no noise."""

    def drawn() -> Array:
        return first_best(logits + noise.gumbels(keys, logits.shape[-1]))

    def best() -> Array:
        return first_best(logits)

    return lax.cond(jnp.any(sampling.temperature > 0), drawn, best)


def first_best(logits: Array) -> Array:
    """Column of the largest logit, the first one of ties, [..., V] -> [...] int32; with a NaN some valid column."""

    def on_cpu(logits: Array) -> Array:
        # XLA's CPU argmax reads one column at a time; these two loops are vectorised
        # (docs/notes/xla-cpu-argmax-is-slow.md measures both).
        columns = jnp.arange(logits.shape[-1], dtype=jnp.int32).reshape((1,) * (logits.ndim - 1) + (-1,))
        is_best = logits == jnp.max(logits, -1, keepdims=True)
        return jnp.min(jnp.where(is_best, columns, logits.shape[-1] - 1), -1)

    return lax.platform_dependent(logits, cpu=on_cpu, default=lambda x: jnp.argmax(x, -1).astype(jnp.int32))


def _columns(width: int) -> Array:
    return jnp.arange(width)[None, None]


def _filter(logits: Array, sampling: RowSampling) -> Array:
    top_k, top_p, min_p = (
        jnp.asarray(value)[:, None, None] for value in (sampling.top_k, sampling.top_p, sampling.min_p)
    )
    logits = jnp.where(_is_in_top_k(logits, top_k), logits, _NOTHING)
    probs = jax.nn.softmax(logits, -1)
    is_kept = _is_in_top_p(probs, top_p) & (probs >= min_p * jnp.max(probs, -1, keepdims=True))
    return jnp.where(is_kept, logits, _NOTHING)


def _is_in_top_k(logits: Array, top_k: Array) -> Array:
    """Bisection for the k-th largest value, exact: the threshold is built bit by bit."""
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)  # the same order as the floats
    enough = jnp.where(top_k > 0, top_k, logits.shape[-1])

    def holds(threshold: Array) -> Array:
        return jnp.sum(ordered >= threshold, -1, keepdims=True, dtype=jnp.int32) >= enough

    return ordered >= _largest_threshold(holds, (*logits.shape[:-1], 1), 32)


def _is_in_top_p(probs: Array, top_p: Array) -> Array:
    """The smallest set of most likely tokens whose mass reaches top_p, by the same bisection."""
    bits = lax.bitcast_convert_type(probs, jnp.uint32)  # probabilities are not negative: bits sort as they do

    def holds(threshold: Array) -> Array:
        return jnp.sum(jnp.where(bits >= threshold, probs, 0.0), -1, keepdims=True) >= top_p

    # At least the best token stays, even if rounding keeps the whole mass below top_p.
    best = jnp.max(bits, -1, keepdims=True)
    threshold = jnp.minimum(_largest_threshold(holds, (*probs.shape[:-1], 1), 31), best)
    return jnp.where(top_p < 1, bits >= threshold, True)


def _largest_threshold(holds, shape: tuple[int, ...], num_bits: int) -> Array:
    """The largest unsigned number for which the monotone predicate `holds`; 0 where it never does."""

    def body(step: Array | int, threshold: Array) -> Array:  # a Python int under jax.disable_jit()
        raised = threshold | (jnp.uint32(1) << jnp.asarray(num_bits - 1 - step, jnp.uint32))
        return jnp.where(holds(raised), raised, threshold)

    return lax.fori_loop(0, num_bits, body, jnp.zeros(shape, jnp.uint32))
