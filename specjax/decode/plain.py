"""Plain decoding: one token per target pass. The baseline's step, and a speculation round without a draft."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from specjax import noise
from specjax.decode import log_probs
from specjax.noise import Role
from specjax.processors import without_padding
from specjax.rows import Decision, append, decide, last_tokens
from specjax.sampling import processing, sample
from specjax.types import Array, LogProbs, Model, Processor, PyTree, Rows, Status


class Step(NamedTuple):
    """One token for each active row, not yet appended."""

    tokens: Array  # [B, 1] int32
    log_probs: LogProbs  # [B, 1] each
    decision: Decision


def step(model: Model, processor: Processor | None, capacity: int, params: PyTree, rows: Rows, cache: PyTree):
    """One target pass over each row's last token, and the token after it: the rows and the cache after. The cache holds
    all tokens of a row but the last, before and after."""
    block = model.init_block(params, rows.lengths.shape[0], 1)
    out = model.apply(params, last_tokens(rows, 1), cache, block)
    new = next_token(model, processor, rows, out.logits[:, 0], capacity)
    cache = model.commit(cache, out.block, new.decision.num_emitted, None)
    return append(rows, new.tokens, new.log_probs, new.decision), cache


def next_token(model: Model, processor: Processor | None, rows: Rows, logits: Array, capacity: int) -> Step:
    """One token from the target's own law: noise is addressed by position, so any verifier can find it again."""
    batch = rows.tokens.shape[0]
    logits = logits[:, None]
    nothing, unseen = jnp.zeros((batch, 0), jnp.int32), jnp.zeros((1, 1, 0), bool)
    processed = processing(rows, processor, model.vocab_size)(logits, nothing, unseen)
    token = sample(noise.derive(rows.keys, Role.TARGET, rows.lengths), processed[:, 0], rows.sampling)[:, None]
    fault = fault_of(logits, processed, model.vocab_size)[:, 0]
    is_sound = jnp.where(fault == Status.ACTIVE, 1, 0)
    scored = log_probs.of_tokens(logits, processed, token, model.vocab_size)
    return Step(token, scored, decide(rows, token, is_sound, fault, capacity=capacity))


def first_token(model: Model, processor: Processor | None, rows: Rows, logits: Array, capacity: int) -> Rows:
    """The token after the prompt; it is part of no round."""
    new = next_token(model, processor, rows, logits, capacity)
    return append(rows, new.tokens, new.log_probs, new.decision)._replace(rounds=rows.rounds)


def fault_of(logits: Array, processed: Array, vocab_size: int) -> Array:
    """Why there is no law at a place: [B, W] int32 `Status`, ACTIVE where there is one."""
    # NaN propagates through max; -inf alone is a mask, not a fault.
    is_finite = jnp.isfinite(jnp.max(without_padding(logits, vocab_size), -1))
    has_choice = jnp.isfinite(jnp.max(processed, -1))
    return jnp.where(is_finite, jnp.where(has_choice, Status.ACTIVE, Status.DEAD_END), Status.NON_FINITE)
