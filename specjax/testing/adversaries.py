"""Drafters that try to break a verifier: for each of them the output's distribution must still be the target's."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.drafters.draft_model import draft_model
from specjax.rows import last_tokens
from specjax.sampling import sample
from specjax.testing.tables import table_model
from specjax.types import Array, Context, Draft, Drafter, DraftPlan, PyTree


class Adversary(NamedTuple):
    """A drafter made to be hard on a verifier, with its parameters."""

    name: str
    drafter: Drafter
    params: PyTree


def adversarial_tables(table: Array, vocab_size: int) -> dict[str, Array]:
    """Draft tables for a target `table`: uniform, reversed (likely becomes unlikely), one-hot at the least likely
    token, near-zero overlap, and a sharpened copy."""
    worst = jax.nn.one_hot(jnp.argmin(table[..., :vocab_size], -1), table.shape[-1])
    best = jax.nn.one_hot(jnp.argmax(table[..., :vocab_size], -1), table.shape[-1])
    return {
        "uniform": jnp.zeros_like(table),
        "reversed": -table,
        "one-hot at the worst": jnp.where(worst > 0, 60.0, 0.0),
        "near-zero overlap": jnp.where(best > 0, -20.0, 0.0),
        "sharpened": 3.0 * table,
    }


def adversaries(table: Array, vocab_size: int) -> list[Adversary]:
    """Drafters for a target `table` [vocab_size + 1] * order + [V]: one for each table above, one whose distribution
    changes from round to round and from place to place, and one that drafts a fixed token with a one-hot
    distribution."""
    model = table_model(table.ndim - 1, vocab_size)
    tables = adversarial_tables(table, vocab_size)
    drafting = [Adversary(name, draft_model(model), changed) for name, changed in tables.items()]
    varying = jnp.stack(list(tables.values()))
    constant = Adversary("one-hot at 0", constant_drafter(0), ())
    return [*drafting, Adversary("time-varying", time_varying_drafter(vocab_size), varying), constant]


@functools.cache
def time_varying_drafter(vocab_size: int) -> Drafter:
    """Drafts from its parameters, n tables [n, vocab_size + 1, ..., V]: another in every round and at every place.

    Of the text it uses the last token and its own draft only.
    """

    def propose(params: Array, state, context: Context, plan: DraftPlan):
        rows = context.rows
        order = params.ndim - 2
        before = jnp.full((rows.tokens.shape[0], order - 1), vocab_size, jnp.int32)
        last, tokens, probs = last_tokens(rows, 1)[:, 0], jnp.zeros((len(before), plan.longest), jnp.int32), []
        for step in range(plan.longest):
            index = (rows.rounds + step) % len(params)
            logits = params[(index, *before.T, last)][:, None].astype(jnp.float32)
            visible = (jnp.arange(plan.longest) < step)[None, None]
            processed = context.process(logits, tokens, visible)[:, 0]
            last = sample(context.draft_keys(step), processed, rows.sampling)
            tokens = tokens.at[:, step].set(last)
            probs.append(jax.nn.softmax(processed, -1))
        return Draft(tokens, plan.lengths, jnp.stack(probs, 1)), state

    return Drafter(propose, vocab_size=vocab_size)


@functools.cache
def constant_drafter(token: int) -> Drafter:
    """Always drafts `token`, from a one-hot distribution, as an argmax drafter does."""

    def propose(params, state, context: Context, plan: DraftPlan):
        batch = context.rows.tokens.shape[0]
        return Draft(jnp.full((batch, plan.longest), token, jnp.int32), plan.lengths, None), state

    return Drafter(propose)
