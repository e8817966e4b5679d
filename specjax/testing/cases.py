"""A target whose texts can be enumerated, and the checks that every verifier with every controller must pass on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decode.api import autoregressive, generate
from specjax.testing.adversaries import Adversary, adversaries
from specjax.testing.distributions import assert_same_distribution, count_sequences, exact_sequence_probs
from specjax.testing.tables import random_table, table_model
from specjax.types import Array, Controller, Drafter, Generation, PyTree, Sampling, Verifier

_VOCAB, _ORDER, _PROMPT = 3, 2, [1, 2]
_MODEL = table_model(_ORDER, _VOCAB)
# All settings have the same fields, so they can be rows of one batch: one program a drafter.
_SETTINGS = {
    "temperature 1": Sampling(1.0, top_p=1.0, presence_penalty=0.0, frequency_penalty=0.0),
    "temperature 0.7, top-p 0.9": Sampling(0.7, top_p=0.9, presence_penalty=0.0, frequency_penalty=0.0),
    "penalties": Sampling(1.0, top_p=1.0, presence_penalty=0.4, frequency_penalty=0.3),
}


@functools.cache
def _table() -> Array:
    return random_table(jax.random.key(11), order=_ORDER, vocab_size=_VOCAB, sharpness=1.5)


def opponents() -> list[Adversary]:
    """Drafters made to break a verifier of this target."""
    return adversaries(_table(), _VOCAB)


def _generate(adversary: Adversary, verifier: Verifier, controller: Controller, *prompts, **options) -> Generation:
    parts = (_MODEL, _table(), adversary.drafter, adversary.params)
    return generate(*parts, *prompts, verifier=verifier, controller=controller, **options)


def check_greedy(adversary: Adversary, verifier: Verifier, controller: Controller) -> str:
    """Greedy output is that of greedy decoding. Returns what was checked; raises AssertionError."""
    prompts, lengths = jnp.array([[1, 2, 0], [2, 0, 0], [0, 1, 1]]), jnp.array([2, 1, 3])
    plain = autoregressive(_MODEL, _table(), prompts, lengths, max_new_tokens=12).new_tokens()
    out = _generate(adversary, verifier, controller, prompts, lengths, max_new_tokens=12).new_tokens()
    if out != plain:
        raise AssertionError(f"greedy against {adversary.name}: {out}, greedy decoding gives {plain}.")
    return f"greedy against {adversary.name}"


def check_rows(adversary: Adversary, verifier: Verifier, controller: Controller) -> str:
    """A row beside different other rows: same tokens, same rounds, same log-probabilities."""
    prompts, seeds = jnp.array([[1, 2, 0], [2, 0, 1], [0, 1, 1]]), jnp.array([4, 9, 2])
    sampling = Sampling(0.0 if verifier.greedy_only else 1.0)

    def run(rows: list[int]) -> Generation:
        chosen = jnp.array(rows)
        return _generate(
            adversary, verifier, controller, prompts[chosen], seeds=seeds[chosen], max_new_tokens=12, sampling=sampling
        )

    together, beside = run([0, 1, 2]), run([0, 2, 2])
    for what, ours, theirs in (
        ("tokens", together.tokens[0], beside.tokens[0]),
        ("log-probabilities", together.log_probs.processed[0], beside.log_probs.processed[0]),
        ("rounds", together.stats.rounds[0], beside.stats.rounds[0]),
    ):
        if (ours != theirs).any():
            raise AssertionError(f"against {adversary.name} row 0's {what} depend on its neighbours: {ours}, {theirs}.")
    return f"rows keep to themselves against {adversary.name}"


@functools.lru_cache(maxsize=8)  # so that programs of earlier controllers are freed
def _sampled(drafter: Drafter, verifier: Verifier, controller: Controller, length: int) -> Callable[..., Array]:
    """(drafter_params, prompts, seeds, sampling) -> texts of `length` new tokens; one program for all of a drafter's
    parameters."""

    def run(drafter_params: PyTree, prompts: Array, seeds: Array, sampling: Sampling) -> Array:
        return _generate(
            Adversary("any", drafter, drafter_params), verifier, controller, prompts, key=jax.random.key(2024),
            seeds=seeds, max_new_tokens=length, sampling=sampling,
        ).tokens  # fmt: skip

    return run


@functools.lru_cache(maxsize=8)
def _each_alone(sampled: Callable[..., Array]) -> Callable[..., Array]:
    """The same, each row in a batch of its own."""

    def row(drafter_params: PyTree, *arrays: PyTree) -> Array:
        return sampled(drafter_params, *jax.tree.map(lambda leaf: leaf[None], arrays))[0]

    return jax.jit(jax.vmap(row, in_axes=(None, 0, 0, 0)))


def check_distributions(
    adversary: Adversary,
    verifier: Verifier,
    controller: Controller,
    *,
    length: int,
    samples: int,
    false_alarm: float,
    said: str,
    alone: bool = False,
) -> Iterator[str]:
    """Whole sequences of `length` tokens at three settings follow their exact distribution; yields what was checked.

    Args:
      samples: sequences a setting.
      said: what to call the controller, in messages.
      alone: generate each sequence in a batch of its own (mapped over), so that a controller that decides for the batch
        decides by that sequence alone.
    """
    sampling = jax.tree.map(lambda *values: jnp.repeat(jnp.array(values), samples), *_SETTINGS.values())
    count = samples * len(_SETTINGS)
    prompts, seeds = jnp.tile(jnp.array([_PROMPT]), (count, 1)), jnp.arange(count, dtype=jnp.int32)

    sampled = _sampled(adversary.drafter, verifier, controller, length)
    tokens = (_each_alone(sampled) if alone else sampled)(adversary.params, prompts, seeds, sampling)
    for (name, setting), texts in zip(_SETTINGS.items(), np.split(np.asarray(tokens), len(_SETTINGS)), strict=True):
        case = f"{name} against {adversary.name}, {said}"
        probs = exact_sequence_probs(_MODEL, _table(), _PROMPT, length, sampling=setting)
        try:
            assert_same_distribution(
                count_sequences(texts, len(_PROMPT), length, _VOCAB), probs, false_alarm=false_alarm
            )
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None
        yield case
