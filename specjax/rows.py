"""What every decoding loop does for its rows: open them, and move them on by the tokens of a round."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from specjax import cache, noise
from specjax.sampling import per_row
from specjax.types import Array, Rows, Sampling, Status


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
    sampling: Sampling,
    stop_tokens: Array,
    slots: int,
    vocab_size: int,
) -> Rows:
    """Fresh rows with room for `slots` tokens. A bad prompt, which traced data can hide, ends its row at once."""
    batch, width = prompts.shape
    place = jnp.arange(width)[None]
    is_prompt = place < prompt_lengths[:, None]
    is_known = (prompts >= 0) & (prompts < vocab_size)
    is_good = (prompt_lengths >= 1) & (prompt_lengths <= width) & jnp.all(is_known | ~is_prompt, -1)
    status = jnp.where(is_good, Status.ACTIVE, Status.BAD_PROMPT).astype(jnp.int32)
    tokens = jnp.zeros((batch, slots), jnp.int32).at[:, :width].set(jnp.where(is_prompt & is_known, prompts, 0))
    return Rows(
        tokens=tokens,
        lengths=jnp.clip(prompt_lengths, 1, width),
        prompt_lengths=prompt_lengths,
        limits=limits,
        status=status,
        keys=noise.row_keys(key, seeds),
        rounds=jnp.zeros((batch,), jnp.int32),
        stop_tokens=stop_tokens,
        sampling=per_row(sampling, batch),
    )


def last_tokens(rows: Rows, count: int) -> Array:
    """The last `count` tokens of each row, [B, count]."""
    place = rows.lengths[:, None] - count + jnp.arange(count)[None]
    return jnp.take_along_axis(rows.tokens, jnp.maximum(place, 0), 1)


def is_active(rows: Rows) -> Array:
    """[B] bool."""
    return rows.status == Status.ACTIVE


def advance(rows: Rows, candidates: Array, num_candidates: Array, faulty: Array, *, capacity: int) -> Advance:
    """Appends to each active row what it may emit of its candidates, and settles its status.

    Args:
      rows: the rows before.
      candidates: [B, W] int32, the tokens to emit in order; entries from num_candidates on are arbitrary.
      num_candidates: [B] int32 in 0..W.
      faulty: [B] bool, the law after the last candidate was not finite: the row ends there.
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
    status = jnp.full_like(rows.status, Status.ACTIVE)
    status = jnp.where(faulty & (num_emitted == num_candidates), Status.NON_FINITE, status)
    status = jnp.where(lengths >= capacity, Status.CACHE_FULL, status)
    status = jnp.where(lengths >= rows.limits, Status.LENGTH, status)
    status = jnp.where(num_emitted == until_stop, Status.STOPPED, status)
    status = jnp.where(was_active, status, rows.status).astype(jnp.int32)

    written = cache.write_rows((rows.tokens[..., None],), (candidates[..., None],), rows.lengths)[0][..., 0]
    rounds = rows.rounds + was_active.astype(jnp.int32)
    moved = rows._replace(tokens=written, lengths=lengths, status=status, rounds=rounds)
    return Advance(moved, jnp.where(place < num_emitted[:, None], candidates, -1), num_emitted)
