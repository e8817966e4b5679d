"""The contract of a Drafter: it states the distribution it drew from, keeps to its row, never changes the output."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import controllers, integers
from specjax.decode import arguments
from specjax.decode.api import autoregressive, generate
from specjax.decode.prefill import CHUNK
from specjax.decode.round import draft, plan_round
from specjax.decode.start import start
from specjax.testing.tables import random_table, table_model
from specjax.types import Array, Controller, Draft, Drafter, Model, Params, PyTree, Sampling, Setup
from specjax.verify import rejection

_LONGEST = 3
_RANKS = 8
_MOST_TABLE = 5000
_FIRST_CHUNK = 3  # tokens


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
      samples: rows whose draft tokens are compared with the stated distributions; 100 or more.
      false_alarm: bound on the chance that an honest drafter fails that comparison.

    Returns:
      What was checked, one line each.

    Raises:
      AssertionError: what is wrong with the drafts.
      ValueError: a vocabulary too large for a table: pass target and target_params.

    >>> from specjax import drafters, testing
    >>> params = testing.random_table(jax.random.key(0), order=1, vocab_size=5)
    >>> len(testing.check_drafter(drafters.draft_model(testing.table_model(1, 5)), params))
    5
    """
    if not isinstance(drafter, Drafter):
        raise ValueError(f"drafter must be a specjax.Drafter, got {type(drafter).__name__}: call its maker.")
    samples = integers.static(samples, "samples", least=100)  # fewer can tell nothing
    false_alarm = integers.real(false_alarm, "false_alarm", lambda x: 0 < x < 1, "between 0 and 1")
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
    _check_chunks(bench)
    _check_output(bench)
    return [
        "drafts hold valid ids, lengths within the plan, and distributions that sum to 1",
        "tokens are drawn from the distribution that the drafter states",
        "a row's draft does not depend on the other rows",
        "a prompt that is read in two chunks gives the draft of one that is read at once",
        "greedy output is that of greedy decoding, with ragged prompts and rows that end early",
    ]


class _Bench:
    def __init__(self, drafter: Drafter, params: PyTree, target: Model, target_params: PyTree):
        self.drafter, self.params, self.target, self.target_params = drafter, params, target, target_params

        def first_draft(setup: Setup, params: Params, arrays: arguments.Request) -> Draft:
            carry = start(setup, params, arrays)
            return draft(setup, params, carry, plan_round(setup, carry))[0]

        self.first_draft = jax.jit(first_draft, static_argnums=0)

    def prompts(self, rows: int) -> Array:
        return jax.random.randint(jax.random.key(1), (rows, 6), 0, self.target.vocab_size)

    def propose(self, prompts: Array, lengths: Any, seeds: Any, sampling: Sampling) -> Draft:
        """The draft of the first round."""
        request = arguments.request(
            self.target, prompts, lengths, key=jax.random.key(5), max_new_tokens=8, sampling=sampling, stop_tokens=(),
            seeds=seeds, capacity=None,
        )  # fmt: skip
        setup = Setup(self.target, self.drafter, rejection(), controllers.fixed(_LONGEST), request.capacity)
        return self.first_draft(setup, Params(self.target_params, self.params), request.arrays)


def _check_shapes(bench: _Bench) -> None:
    prompts = bench.prompts(4)
    draft = bench.propose(prompts, jnp.array([6, 1, 3, 2]), None, Sampling(jnp.array([0.0, 1.0, 0.7, 1.0])))
    if not isinstance(draft, Draft):
        raise AssertionError(f"propose must return (Draft, state), got a {type(draft).__name__} for the draft.")
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
    if probs.ndim != 3 or probs.shape[:2] != tokens.shape or probs.shape[2] < bench.target.vocab_size:
        raise AssertionError(
            f"draft.probs must be [B, K, V] = [4, {tokens.shape[1]}, {bench.target.vocab_size} or more], "
            f"got {probs.shape}."
        )
    for row in range(4):
        for place in range(lengths[row]):
            if abs(probs[row, place].sum() - 1) > 1e-3 or (probs[row, place] < 0).any():
                raise AssertionError(f"draft.probs[{row}, {place}] sums to {probs[row, place].sum():.4f}, not to 1.")
            if probs[row, place, tokens[row, place]] == 0:
                raise AssertionError(f"draft token [{row}, {place}] was drawn, yet its stated probability is 0.")


def _check_honest(bench: _Bench, samples: int, false_alarm: float) -> None:
    """Compares draft tokens with the stated distributions, over all rows and places together.

    It counts how often one of the n most likely tokens was drawn, for a few n, and how often each id was drawn. Each
    count is a sum of independent draws with known probabilities, so Bernstein's inequality bounds its deviation.
    """
    draft = bench.propose(jnp.tile(bench.prompts(1), (samples, 1)), None, None, Sampling(1.0))
    tokens, width = np.asarray(draft.tokens), bench.target.vocab_size
    is_drafted = np.arange(tokens.shape[1])[None] < np.asarray(draft.lengths)[:, None]
    probs = np.eye(width)[tokens] if draft.probs is None else np.asarray(draft.probs, np.float64)[..., :width]
    probs, tokens = probs[is_drafted], tokens[is_drafted]
    own = probs[np.arange(len(tokens)), tokens]
    ranked = -np.sort(-probs, -1)
    kinds = {}
    for place in range(min(_RANKS, width)):
        least = ranked[:, place]  # ties are taken together
        prob = np.where(probs >= least[:, None], probs, 0.0).sum(-1)
        kinds[f"one of the {place + 1} most likely tokens"] = (own >= least, prob)
    for token in range(width):
        if probs[:, token].sum() >= 5:
            kinds[f"token {token}"] = (tokens == token, probs[:, token])
    bound = math.log(2 * max(len(kinds), 1) / false_alarm)
    for what, (came, prob) in kinds.items():
        expected, variance = prob.sum(), (prob * (1 - prob)).sum()
        allowed = bound / 3 + math.sqrt(bound**2 / 9 + 2 * variance * bound)
        if abs(came.sum() - expected) > allowed:
            raise AssertionError(
                "draft tokens do not follow the distribution that the drafter states: "
                f"{what} came {int(came.sum())} times in {len(tokens)} draws, {expected:.0f} were to be expected, "
                f"give or take {allowed:.0f} at most."
            )


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


def _check_chunks(bench: _Bench) -> None:
    """A chunk that holds nothing of a row must not count as the row's, and a later chunk must not replace an earlier.

    The padding makes the buffer longer than a chunk, so that the prompts' first tokens are a chunk of their own.
    """
    endless = bench.target._replace(max_positions=None)  # padding may stand past the target's last position
    bench = _Bench(bench.drafter, bench.params, endless, bench.target_params)
    prompts, lengths, seeds = bench.prompts(4), jnp.array([6, 3, 4, 1]), jnp.array([5, 8, 2, 1])
    padded = jnp.pad(prompts, ((0, 0), (0, CHUNK + _FIRST_CHUNK - prompts.shape[1])))
    for temperature in (0.0, 1.0):
        once, twice = (bench.propose(each, lengths, seeds, Sampling(temperature)) for each in (prompts, padded))
        for row in range(4):
            count = int(once.lengths[row])
            if int(twice.lengths[row]) != count or (once.tokens[row] != twice.tokens[row])[:count].any():
                raise AssertionError(
                    f"after a prompt of {lengths[row]} tokens that `read` got in chunks of {_FIRST_CHUNK} and {CHUNK} "
                    f"the draft is {twice.tokens[row].tolist()}, read at once it is {once.tokens[row].tolist()}: the "
                    "first keep[b] tokens of a chunk are the row's, and there may be none. (In bfloat16 a near-tie may "
                    "do this as well: try float32.)"
                )


def _check_output(bench: _Bench) -> None:
    prompts, lengths = bench.prompts(3), jnp.array([6, 1, 3])
    limits, capacity = jnp.array([12, 3, 9]), 20
    plain = autoregressive(
        bench.target, bench.target_params, prompts, lengths, max_new_tokens=limits, capacity=capacity
    ).new_tokens()
    ways = {
        "K = 1": controllers.fixed(1),
        f"K = {_LONGEST}": controllers.fixed(_LONGEST),
        "a draft in every third round": _EVERY_THIRD,
    }
    for name, controller in ways.items():
        out = generate(
            bench.target, bench.target_params, bench.drafter, bench.params, prompts, lengths, max_new_tokens=limits,
            capacity=capacity, controller=controller,
        ).new_tokens()  # fmt: skip
        if out != plain:
            raise AssertionError(f"greedy output with {name} is {out}, greedy decoding gives {plain}.")


_EVERY_THIRD = Controller(
    init=lambda batch: jnp.int32(0),
    draft_len=lambda state, rows: jnp.full(rows.lengths.shape, jnp.where(state % 3 == 2, _LONGEST, 0)),
    update=lambda state, info: state + 1,
    buckets=(0, _LONGEST),
)
