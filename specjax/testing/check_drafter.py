"""The contract of a Drafter: it says from which law it drew, keeps to its row, and never changes the output."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import controllers, validate
from specjax.decode import autoregressive, generate
from specjax.rounds import Roles, context_of, plan_of, start
from specjax.testing.laws import assert_same_law
from specjax.testing.tables import random_table, table_model
from specjax.types import Array, Draft, Drafter, Model, PyTree, Sampling
from specjax.verify import rejection

_LONGEST = 3
_MOST_TABLE = 5000


def check_drafter(
    drafter: Drafter,
    params: PyTree,
    *,
    target: Model | None = None,
    target_params: PyTree = None,
    samples: int = 2000,
    false_alarm: float = 1e-6,
) -> list[str]:
    """Checks `drafter` under a target of the same vocabulary.

    Args:
      drafter: under test.
      params: its parameters.
      target, target_params: what it drafts for; default a random table over the last token.
      samples: rows that draw from one and the same law, for the chi-square test of what was drawn.
      false_alarm: bound on the chance that an honest drafter fails that test.

    Returns:
      What was checked, one line each.

    Raises:
      AssertionError: what is wrong with the drafts.
      ValueError: a vocabulary too large for a table: pass target and target_params.

    >>> from specjax import drafters, testing
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=5)
    >>> len(testing.check_drafter(drafters.draft_model(testing.table_model(1, 5)), params))
    4
    """
    if target is None:
        vocab_size = drafter.vocab_size or 5
        if vocab_size > _MOST_TABLE:
            raise ValueError(f"{vocab_size} ids are too many for a table: pass target= and target_params=.")
        target = table_model(1, vocab_size)
        target_params = random_table(jax.random.key(7), order=1, vocab_size=vocab_size)
    bench = _Bench(drafter, params, target, target_params)
    _check_shapes(bench)
    _check_honest(bench, samples, false_alarm)
    _check_rows(bench)
    _check_output(bench)
    return [
        "drafts hold valid ids, lengths within the plan, and laws that sum to 1",
        "tokens are drawn from the law that the drafter states",
        "a row's draft does not depend on the other rows",
        "greedy output is that of greedy decoding, with ragged prompts and rows that end early",
    ]


class _Bench:
    def __init__(self, drafter: Drafter, params: PyTree, target: Model, target_params: PyTree):
        self.drafter, self.params, self.target, self.target_params = drafter, params, target, target_params
        self.roles = roles = Roles(target, drafter, rejection(), controllers.fixed(_LONGEST))

        def first_draft(capacity: int, target_params: PyTree, params: PyTree, arrays: validate.Request) -> Draft:
            state = start(roles, capacity, target_params, params, arrays)
            context = context_of(roles, state.rows, state.target_cache)
            plan = plan_of(roles.controller, state.controller_state, state.rows)
            return drafter.propose(params, state.drafter_state, context, plan)[0]

        self.first_draft = jax.jit(first_draft, static_argnums=0)

    def prompts(self, rows: int) -> Array:
        return jax.random.randint(jax.random.key(1), (rows, 6), 0, self.target.vocab_size)

    def propose(self, prompts: Array, lengths: Any, seeds: Any, sampling: Sampling) -> Draft:
        """The draft of the first round."""
        request = validate.request(
            self.target, prompts, lengths, key=jax.random.key(5), max_new_tokens=8, sampling=sampling, stop_tokens=(),
            seeds=seeds, capacity=None,
        )  # fmt: skip
        return self.first_draft(request.capacity, self.target_params, self.params, request.arrays)


def _check_shapes(bench: _Bench) -> None:
    prompts = bench.prompts(4)
    draft = bench.propose(prompts, jnp.array([6, 1, 3, 2]), None, Sampling(jnp.array([0.0, 1.0, 0.7, 1.0])))
    tokens, lengths = np.asarray(draft.tokens), np.asarray(draft.lengths)
    if tokens.shape[0] != 4 or tokens.dtype != np.int32:
        raise AssertionError(f"draft.tokens must be int32 [4, n], got {tokens.dtype} {tokens.shape}.")
    if (tokens < 0).any() or (tokens >= bench.target.vocab_size).any():
        raise AssertionError(f"draft.tokens holds ids outside 0..{bench.target.vocab_size - 1}: {tokens.tolist()}.")
    if (lengths < 0).any() or (lengths > tokens.shape[1]).any():
        raise AssertionError(f"draft.lengths must lie in 0..{tokens.shape[1]}, got {lengths.tolist()}.")
    if draft.probs is None:
        return
    probs = np.asarray(draft.probs, np.float64)
    for row in range(4):
        for place in range(lengths[row]):
            if abs(probs[row, place].sum() - 1) > 1e-3 or (probs[row, place] < 0).any():
                raise AssertionError(f"draft.probs[{row}, {place}] sums to {probs[row, place].sum():.4f}, not to 1.")
            if probs[row, place, tokens[row, place]] == 0:
                raise AssertionError(f"draft token [{row}, {place}] was drawn, yet its stated probability is 0.")


def _check_honest(bench: _Bench, samples: int, false_alarm: float) -> None:
    """Rows that differ in their seed alone; those whose first law is the same are counted together."""
    prompts = jnp.tile(bench.prompts(1), (samples, 1))
    draft = bench.propose(prompts, None, None, Sampling(1.0))
    tokens, lengths = np.asarray(draft.tokens)[:, 0], np.asarray(draft.lengths)
    width = bench.target.vocab_size
    laws = np.eye(width)[tokens] if draft.probs is None else np.asarray(draft.probs, np.float64)[:, 0, :width]
    laws, tokens = laws[lengths > 0], tokens[lengths > 0]
    groups: dict[bytes, list[int]] = {}
    for row, law in enumerate(laws.astype(np.float32).round(5)):
        groups.setdefault(law.tobytes(), []).append(row)
    for rows in groups.values():
        if len(rows) >= 200:
            law = laws[rows[0]] / laws[rows[0]].sum()
            try:
                assert_same_law(np.bincount(tokens[rows], minlength=width), law, false_alarm=false_alarm)
            except AssertionError as error:
                raise AssertionError(f"draft tokens do not follow the law that the drafter states: {error}") from None


def _check_rows(bench: _Bench) -> None:
    prompts, lengths, seeds = bench.prompts(3), jnp.array([6, 2, 4]), jnp.array([5, 8, 2])
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature)
        together = bench.propose(prompts, lengths, seeds, sampling)
        for row in range(3):
            pick = slice(row, row + 1)
            alone = bench.propose(prompts[pick], lengths[pick], seeds[pick], sampling)
            count = int(alone.lengths[0])
            if int(together.lengths[row]) != count or (alone.tokens[0] != together.tokens[row])[:count].any():
                raise AssertionError(
                    f"row {row} drafts {together.tokens[row].tolist()} in a batch, {alone.tokens[0].tolist()} alone."
                )


def _check_output(bench: _Bench) -> None:
    prompts, lengths = bench.prompts(3), jnp.array([6, 1, 3])
    limits, capacity = jnp.array([12, 3, 9]), 20
    plain = autoregressive(
        bench.target, bench.target_params, prompts, lengths, max_new_tokens=limits, capacity=capacity
    ).new_tokens()
    for draft_len in (1, _LONGEST):
        out = generate(
            bench.target, bench.target_params, bench.drafter, bench.params, prompts, lengths, max_new_tokens=limits,
            capacity=capacity, controller=controllers.fixed(draft_len),
        ).new_tokens()  # fmt: skip
        if out != plain:
            raise AssertionError(f"greedy output with K = {draft_len} is {out}, greedy decoding gives {plain}.")
