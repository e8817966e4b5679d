"""What every decoding loop does for its rows: open them, and move them on by the tokens of a round."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax import noise
from specjax.processors import count, counts_are_needed, open_counts
from specjax.sampling import per_row
from specjax.types import Array, LogProbs, Rows, Sampling, Status


class Advance(NamedTuple):
    """The rows after a round, and what each of them emitted."""

    rows: Rows
    tokens: Array  # [B, W] int32, pad -1
    num_emitted: Array  # [B] int32


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
    """Fresh rows with room for `slots` tokens. A bad prompt, which traced data can hide, ends its row at once."""
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


def advance(
    rows: Rows, candidates: Array, log_probs: LogProbs, num_candidates: Array, fault: Array, *, capacity: int
) -> Advance:
    """Appends to each active row what it may emit of its candidates, and settles its status.

    Args:
      rows: the rows before.
      candidates: [B, W] int32, the tokens to emit in order; entries from num_candidates on are arbitrary.
      log_probs: [B, W] each, of the candidates.
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

    # Later lines override earlier ones: a row that ends for its own reason is not faulty or full.
    lengths = rows.lengths + num_emitted
    status = jnp.where(num_emitted == num_candidates, fault, Status.ACTIVE)
    status = jnp.where(lengths >= capacity, Status.CACHE_FULL, status)
    status = jnp.where(lengths >= rows.limits, Status.LENGTH, status)
    status = jnp.where(num_emitted == until_stop, Status.STOPPED, status)
    status = jnp.where(was_active, status, rows.status).astype(jnp.int32)

    @jax.vmap  # by rows, which a mesh may cut: with row numbers as indices XLA would send the rows around
    def append(text: Array, new: Array, start: Array) -> Array:
        at = start + jnp.arange(width)
        return text.at[at].set(new, mode="drop", indices_are_sorted=True, unique_indices=True)

    moved = rows._replace(
        tokens=append(rows.tokens, candidates, rows.lengths),
        lengths=lengths,
        status=status,
        rounds=rows.rounds + was_active.astype(jnp.int32),
        log_probs=LogProbs(*(append(*both, rows.lengths) for both in zip(rows.log_probs, log_probs, strict=True))),
        counts=None if rows.counts is None else count(rows.counts, candidates, num_emitted),
    )
    return Advance(moved, jnp.where(place < num_emitted[:, None], candidates, -1), num_emitted)
