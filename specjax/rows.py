"""The rows of a batch: how every decoding loop makes them, and appends the tokens of a round."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax import noise
from specjax.processors import count, counts_are_needed, open_counts
from specjax.sampling import per_row
from specjax.types import Array, LogProbs, Rows, Sampling, Status


class Decision(NamedTuple):
    """How many tokens each row emits in a round, and its status after the round."""

    num_emitted: Array  # [B] int32
    status: Array  # [B] int32, a `Status`


def open_rows(
    prompts: Array,
    prompt_lengths: Array,
    *,
    key: Array,
    seeds: Array,
    limits: Array,
    draft_limits: Array,
    sampling: Sampling,
    stop_tokens: Array,
    slots: int,
    vocab_size: int,
) -> Rows:
    """Fresh rows with room for `slots` tokens. A bad prompt (traced prompts are not checked before) ends its row."""
    batch, width = prompts.shape
    place = jnp.arange(width)[None]
    is_prompt = place < prompt_lengths[:, None]
    settings = per_row(sampling, batch)
    is_known = (prompts >= 0) & (prompts < vocab_size)
    is_good = (prompt_lengths >= 1) & (prompt_lengths <= width) & jnp.all(is_known | ~is_prompt, -1)
    status = jnp.where(is_good, Status.ACTIVE, Status.BAD_PROMPT).astype(jnp.int32)
    clean = jnp.where(is_prompt & is_known, prompts, 0)
    tokens = jnp.zeros((batch, slots), jnp.int32).at[:, :width].set(clean)
    nothing = jnp.zeros((batch, slots), jnp.float32)
    return Rows(
        tokens=tokens,
        lengths=jnp.clip(prompt_lengths, 1, width),
        prompt_lengths=prompt_lengths,
        limits=limits,
        draft_limits=draft_limits,
        status=status,
        keys=noise.row_keys(key, seeds),
        rounds=jnp.zeros((batch,), jnp.int32),
        stop_tokens=stop_tokens,
        sampling=settings,
        log_probs=LogProbs(nothing, nothing),
        counts=open_counts(clean, prompt_lengths, vocab_size) if counts_are_needed(settings) else None,
    )


def last_tokens(rows: Rows, count: int) -> Array:
    """The last `count` tokens of each row, [B, count]."""
    place = rows.lengths[:, None] - count + jnp.arange(count)[None]
    return jnp.take_along_axis(rows.tokens, jnp.maximum(place, 0), 1)


def is_active(rows: Rows) -> Array:
    """[B] bool."""
    return rows.status == Status.ACTIVE


def decide(rows: Rows, candidates: Array, num_candidates: Array, fault: Array, *, capacity: int) -> Decision:
    """How many of its candidates each active row may emit, and its status after that.

    Args:
      rows: the rows before.
      candidates: [B, W] int32, the tokens to emit in order; entries from num_candidates on are arbitrary.
      num_candidates: [B] int32 in 0..W.
      fault: [B] int32, the `Status` that ends the row after its last candidate; ACTIVE where nothing is wrong.
      capacity: the most tokens a row may hold, prompt included.
    """
    width = candidates.shape[1]
    place = jnp.arange(width)[None]
    was_active = is_active(rows)
    is_stop = jnp.any(candidates[:, :, None] == rows.stop_tokens[:, None, :], -1)
    until_stop = jnp.min(jnp.where(is_stop, place, width), -1) + 1
    until_limit = rows.limits - rows.lengths
    until_full = capacity - rows.lengths
    num_emitted = jnp.minimum(num_candidates, until_stop)
    num_emitted = jnp.minimum(num_emitted, jnp.minimum(until_limit, until_full))
    num_emitted = jnp.where(was_active, jnp.maximum(num_emitted, 0), 0)

    # Later lines override earlier ones: a row that reaches a stop token or its limit is neither faulty nor full.
    lengths = rows.lengths + num_emitted
    status = jnp.where(num_emitted == num_candidates, fault, Status.ACTIVE)
    status = jnp.where(lengths >= capacity, Status.CACHE_FULL, status)
    status = jnp.where(lengths >= rows.limits, Status.LENGTH, status)
    status = jnp.where(num_emitted == until_stop, Status.STOPPED, status)
    return Decision(num_emitted, jnp.where(was_active, status, rows.status).astype(jnp.int32))


def append(rows: Rows, candidates: Array, log_probs: LogProbs, decision: Decision) -> Rows:
    """Appends the decided number of candidates [B, W], with their log-probabilities [B, W], to the rows.

    A row that neither emits nor ends took no part in the round: it keeps its round number, and so the noise of its next
    round. The reason: whether such a round runs depends on the other rows.
    """
    width = candidates.shape[1]

    @jax.vmap  # a mesh may split the rows; with row numbers as indices XLA would move rows between devices
    def write(text: Array, new: Array, start: Array) -> Array:
        at = start + jnp.arange(width)
        return text.at[at].set(new, mode="drop", indices_are_sorted=True, unique_indices=True)

    took_part = is_active(rows) & ((decision.num_emitted > 0) | (decision.status != Status.ACTIVE))
    both = zip(rows.log_probs, log_probs, strict=True)
    return rows._replace(
        tokens=write(rows.tokens, candidates, rows.lengths),
        lengths=rows.lengths + decision.num_emitted,
        status=decision.status,
        rounds=rows.rounds + took_part.astype(jnp.int32),
        log_probs=LogProbs(*(write(old, new, rows.lengths) for old, new in both)),
        counts=None if rows.counts is None else count(rows.counts, candidates, decision.num_emitted),
    )
