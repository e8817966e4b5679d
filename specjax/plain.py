"""Plain decoding: one token per target pass. The baseline's step, and a speculation round without a draft."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from specjax import log_probs, noise
from specjax.noise import Role
from specjax.processors import without_padding
from specjax.rows import Advance, advance, last_tokens
from specjax.sampling import processing, sample
from specjax.types import Array, Model, Output, Processor, PyTree, Rows, Status


class Step(NamedTuple):
    """One token of each active row."""

    moved: Advance  # tokens [B, 1]
    log_probs: log_probs.LogProbs  # [B, 1] each
    out: Output  # of the target's pass
    cache: PyTree


def step(
    model: Model,
    processor: Processor | None,
    capacity: int,
    params: PyTree,
    rows: Rows,
    cache: PyTree,
    hidden_layers: tuple[int, ...] = (),
) -> Step:
    """One target pass over each row's last token, and the token after it; the cache holds all tokens before."""
    block = model.init_block(params, rows.lengths.shape[0], 1)
    out = model.apply(params, last_tokens(rows, 1), cache, block, hidden_layers=hidden_layers)
    emitted = emit_one(model, processor, rows, out.logits[:, 0], capacity)
    return Step(*emitted, out, model.commit(cache, out.block, emitted.moved.num_emitted, None))


class Emitted(NamedTuple):
    """What `emit_one` found."""

    moved: Advance
    log_probs: log_probs.LogProbs  # [B, 1] each


def emit_one(model: Model, processor: Processor | None, rows: Rows, logits: Array, capacity: int) -> Emitted:
    """One token from the target's own law: noise is addressed by position, so any verifier can find it again."""
    batch = rows.tokens.shape[0]
    logits = logits[:, None]
    nothing, unseen = jnp.zeros((batch, 0), jnp.int32), jnp.zeros((1, 1, 0), bool)
    processed = processing(rows, processor, model.vocab_size)(logits, nothing, unseen)
    token = sample(noise.derive(rows.keys, Role.TARGET, rows.lengths), processed[:, 0], rows.sampling)[:, None]
    fault = fault_of(logits, processed, model.vocab_size)[:, 0]
    scored = log_probs.of_tokens(logits, processed, token, model.vocab_size)
    is_sound = jnp.where(fault == Status.ACTIVE, 1, 0)
    return Emitted(advance(rows, token, scored, is_sound, fault, capacity=capacity), scored)


def first_token(model: Model, processor: Processor | None, rows: Rows, logits: Array, capacity: int) -> Rows:
    """The token after the prompt; it is part of no round."""
    moved = emit_one(model, processor, rows, logits, capacity).moved
    return moved.rows._replace(rounds=rows.rounds)


def fault_of(logits: Array, processed: Array, vocab_size: int) -> Array:
    """Why there is no law at a place: [B, W] int32 `Status`, ACTIVE where there is one."""
    # NaN propagates through max; -inf alone is a mask, not a fault.
    is_finite = jnp.isfinite(jnp.max(without_padding(logits, vocab_size), -1))
    has_choice = jnp.isfinite(jnp.max(processed, -1))
    return jnp.where(is_finite, jnp.where(has_choice, Status.ACTIVE, Status.DEAD_END), Status.NON_FINITE)
