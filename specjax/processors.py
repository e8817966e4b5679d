"""The steps before temperature: penalties, bias, bad words, minimum length, the caller's own rule.

Every place of a forward pass is processed with the tokens before *it*: a place after three draft tokens counts those
three too. So each place has the distribution that plain decoding would have there, and verification stays exact.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.types import Array, Counts, Processor, Rows, RowSampling


class Before(NamedTuple):
    """The text before each of T places: the row's own, then this round's draft tokens that the place sees."""

    rows: Rows
    drafted: Array  # [B, N] int32
    visible: Array  # [B or 1, T, N] bool
    depths: Array  # [B or 1, N] int32


def adjust(logits: Array, before: Before, processor: Processor | None, vocab_size: int) -> Array:
    """Applies all steps before temperature to the logits [B, T, V]; same shape, float32.

    Order: repetition, frequency and presence penalties, bias, bad words, minimum length, the caller's processor.
    Repetition counts the prompt as Hugging Face does (arXiv:1909.05858); presence and frequency count generated tokens
    only, as the OpenAI API does.

    Columns from vocab_size on are returned unchanged; `sampling.process` removes them.
    """
    sampling = before.rows.sampling
    asked = (before.rows.counts, sampling.logit_bias, sampling.bad_words, sampling.min_new_tokens, processor)
    if all(each is None for each in asked):
        return logits
    padding = logits[..., vocab_size:]
    logits = logits[..., :vocab_size]
    if before.rows.counts is not None:
        logits = _penalise(logits, sampling, before.rows.counts, before)
    if sampling.logit_bias is not None:
        logits = logits + sampling.logit_bias[:, None]
    if sampling.bad_words is not None:
        logits = jnp.where(_is_among(sampling.bad_words, vocab_size)[:, None], -jnp.inf, logits)
    if sampling.min_new_tokens is not None:
        num_before = before.rows.lengths[:, None] - before.rows.prompt_lengths[:, None] + jnp.sum(before.visible, -1)
        is_early = num_before < sampling.min_new_tokens[:, None]  # [B, T]
        is_stop = _is_among(before.rows.stop_tokens, vocab_size)
        logits = jnp.where(is_early[..., None] & is_stop[:, None], -jnp.inf, logits)
    if processor is not None:
        logits = _custom(logits, before, processor)
    return jnp.concatenate([logits, padding], -1) if padding.shape[-1] else logits


def without_padding(logits: Array, vocab_size: int) -> Array:
    """The logits with -inf in the columns from vocab_size on.

    Where a mesh splits the columns, a slice would move logits between devices.
    """
    if logits.shape[-1] == vocab_size:
        return logits
    columns = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.where(columns < vocab_size, logits, -jnp.inf)


def counts_are_needed(sampling: RowSampling) -> bool:
    """Whether any penalty is asked for."""
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    return any(penalty is not None for penalty in penalties)


def open_counts(prompts: Array, prompt_lengths: Array, vocab_size: int) -> Counts:
    """Counts of rows that hold only their prompts: prompts [B, P], with valid ids below the lengths."""
    batch, width = prompts.shape
    is_prompt = jnp.arange(width)[None] < prompt_lengths[:, None]
    seen = _by_row(lambda seen, ids, here: seen.at[ids].max(here, mode="drop"))
    none = jnp.zeros((batch, vocab_size), jnp.int32)
    return Counts(seen(none > 0, prompts, is_prompt), none)


def count(counts: Counts, tokens: Array, num_tokens: Array) -> Counts:
    """The counts after the first num_tokens [B] of `tokens` [B, W] were generated."""
    is_new = (jnp.arange(tokens.shape[1])[None] < num_tokens[:, None]).astype(jnp.int32)
    return counts._replace(generated=_add(counts.generated, tokens, is_new))


# A mesh may split the rows. Under vmap they stay apart; with row numbers as indices XLA would move them around.
_by_row = jax.vmap


@_by_row
def _add(counts: Array, ids: Array, amounts: Array) -> Array:
    return counts.at[ids].add(amounts, mode="drop")


def _penalise(logits: Array, sampling: RowSampling, counts: Counts, before: Before) -> Array:
    batch, places, _ = logits.shape
    generated = jnp.broadcast_to(counts.generated[:, None], logits.shape)
    if before.drafted.shape[1]:
        visible = jnp.broadcast_to(before.visible, (batch, places, before.drafted.shape[1]))
        drafted = jnp.broadcast_to(before.drafted[:, None], visible.shape)
        generated = _by_row(_add)(generated, drafted, visible.astype(jnp.int32))
    if sampling.repetition_penalty is not None:
        penalty = sampling.repetition_penalty[:, None, None]
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(counts.in_prompt[:, None] | (generated > 0), penalised, logits)
    if sampling.frequency_penalty is not None:
        logits = logits - sampling.frequency_penalty[:, None, None] * generated.astype(logits.dtype)
    if sampling.presence_penalty is not None:
        logits = logits - jnp.where(generated > 0, sampling.presence_penalty[:, None, None], 0.0)
    return logits


def _custom(logits: Array, before: Before, processor: Processor) -> Array:
    rows = before.rows
    capacity = rows.tokens.shape[1]
    places = logits.shape[1]
    batch = rows.tokens.shape[0]
    shape = (batch, places, before.drafted.shape[1])
    visible = jnp.broadcast_to(before.visible, shape)
    depths = jnp.broadcast_to(before.depths[:, None], shape)

    def one_place(logits, tokens, length, drafted, visible, depths):
        total = length + jnp.sum(visible, dtype=jnp.int32)
        at = jnp.where(visible, length + depths, capacity)  # tokens that are not visible are dropped
        text = tokens.at[at].set(drafted, mode="drop")
        changed = processor(logits, jnp.where(jnp.arange(capacity) < total, text, -1), total)
        kind = getattr(changed, "dtype", None)
        if kind is None or not jnp.issubdtype(kind, jnp.floating) or changed.shape != logits.shape:
            got = type(changed).__name__ if kind is None else f"{kind}{list(changed.shape)}"
            raise ValueError(
                f"the processor must return logits of the shape it was given, float32 [V] = [{logits.shape[0]}], got "
                f"{got}. For a mask return jnp.where(mask, logits, -jnp.inf)."
            )
        return changed

    over_places = jax.vmap(one_place, (0, None, None, None, 0, 0))
    out = jax.vmap(over_places)(logits, rows.tokens, rows.lengths, before.drafted, visible, depths)
    return out.astype(jnp.float32)


def _is_among(ids: Array, vocab_size: int) -> Array:
    """[B, n] ids, pad -1 -> [B, V] bool."""
    at = jnp.where(ids < 0, vocab_size, ids)
    nowhere = jnp.zeros((len(ids), vocab_size), bool)
    return _by_row(lambda found, at: found.at[at].set(True, mode="drop"))(nowhere, at)
