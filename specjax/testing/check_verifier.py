"""The contract of a Verifier: whole sequences over several rounds follow the target's law, whatever the drafter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from specjax import controllers
from specjax.decode import autoregressive, generate
from specjax.testing.adversaries import Adversary, adversaries
from specjax.testing.laws import assert_same_law, count_sequences, exact_sequence_law
from specjax.testing.tables import random_table, table_model
from specjax.types import Array, Model, Sampling, Verifier

_VOCAB, _ORDER, _LENGTH, _PROMPT = 3, 2, 4, [1, 2]
# One field of each, so that all of them are rows of one batch: one program a drafter.
_SETTINGS = {
    "temperature 1": Sampling(1.0, top_p=1.0, presence_penalty=0.0, frequency_penalty=0.0),
    "temperature 0.7, top-p 0.9": Sampling(0.7, top_p=0.9, presence_penalty=0.0, frequency_penalty=0.0),
    "penalties": Sampling(1.0, top_p=1.0, presence_penalty=0.4, frequency_penalty=0.3),
}


def check_verifier(
    verifier: Verifier, *, lossless: bool = True, samples: int = 20_000, false_alarm: float = 1e-6
) -> list[str]:
    """Checks `verifier` on a target that can be enumerated, against drafters made to break it.

    Greedy output must equal greedy decoding, and no row may change with its neighbours, its rounds included. Where
    `lossless`, sequences of 4 tokens are drawn at three settings with every adversary, 1 and 3 draft tokens a round
    (up to 3 rounds), and compared with their exact law by a chi-square test.

    Args:
      verifier: under test.
      lossless: False for a rule that does not claim to follow the target's law.
      samples: sequences a case.
      false_alarm: bound on the chance that an exact verifier fails a case.

    Returns:
      What was checked, one line each.

    Raises:
      AssertionError: which case failed, and how.

    >>> from specjax import testing, verify
    >>> len(testing.check_verifier(verify.greedy()))
    14
    """
    if not isinstance(verifier, Verifier):
        raise ValueError(f"verifier must be a specjax.Verifier, got {type(verifier).__name__}: call its maker.")
    model = table_model(_ORDER, _VOCAB)
    table = random_table(jax.random.key(11), order=_ORDER, vocab_size=_VOCAB, sharpness=1.5)
    against = adversaries(table, _VOCAB)
    is_sampled = not verifier.greedy_only
    done = []
    for adversary in against:
        _check_greedy(verifier, model, table, adversary)
        done.append(f"greedy against {adversary.name}")
        _check_rows(verifier, model, table, adversary, 1.0 if is_sampled else 0.0)
        done.append(f"rows keep to themselves against {adversary.name}")
    if not (is_sampled and lossless):
        return done
    laws = {name: exact_sequence_law(model, table, _PROMPT, _LENGTH, sampling=s) for name, s in _SETTINGS.items()}
    for adversary in against:
        for draft_len in (1, 3):
            by_setting = _draw(verifier, model, table, adversary, draft_len, samples)
            for setting, tokens in zip(laws, by_setting, strict=True):
                case = f"{setting} against {adversary.name}, K = {draft_len}"
                try:
                    counts = count_sequences(tokens, len(_PROMPT), _LENGTH, _VOCAB)
                    assert_same_law(counts, laws[setting], false_alarm=false_alarm)
                except AssertionError as error:
                    raise AssertionError(f"{case}: {error}") from None
                done.append(case)
    return done


def _draw(
    verifier: Verifier, model: Model, table: Array, adversary: Adversary, draft_len: int, samples: int
) -> list[np.ndarray]:
    """Texts [samples, C] for each setting, all from one batch."""
    sampling = jax.tree.map(lambda *values: jnp.repeat(jnp.array(values), samples), *_SETTINGS.values())
    prompts = jnp.tile(jnp.array([_PROMPT]), (samples * len(_SETTINGS), 1))
    out = generate(
        model, table, adversary.drafter, adversary.params, prompts, key=jax.random.key(2024),
        max_new_tokens=_LENGTH, sampling=sampling, verifier=verifier, controller=controllers.fixed(draft_len),
    )  # fmt: skip
    return np.split(np.asarray(out.tokens), len(_SETTINGS))


def _check_greedy(verifier: Verifier, model: Model, table: Array, adversary: Adversary) -> None:
    prompts, lengths = jnp.array([[1, 2, 0], [2, 0, 0], [0, 1, 1]]), jnp.array([2, 1, 3])
    plain = autoregressive(model, table, prompts, lengths, max_new_tokens=12).new_tokens()
    out = generate(
        model, table, adversary.drafter, adversary.params, prompts, lengths, max_new_tokens=12, verifier=verifier,
        controller=controllers.fixed(3),
    )  # fmt: skip
    if out.new_tokens() != plain:
        raise AssertionError(f"greedy against {adversary.name}: {out.new_tokens()}, greedy decoding gives {plain}.")


def _check_rows(verifier: Verifier, model: Model, table: Array, adversary: Adversary, temperature: float) -> None:
    """The same row alone and beside another: same tokens, same rounds, same log-probabilities."""
    prompts, seeds = jnp.array([[1, 2, 0], [2, 0, 1], [0, 1, 1]]), jnp.array([4, 9, 2])

    def run(rows: list[int]):
        return generate(
            model, table, adversary.drafter, adversary.params, prompts[jnp.array(rows)], seeds=seeds[jnp.array(rows)],
            max_new_tokens=12, sampling=Sampling(temperature), verifier=verifier, controller=controllers.fixed(3),
        )  # fmt: skip

    together, beside = run([0, 1, 2]), run([0, 2, 2])
    for what, ours, theirs in (
        ("tokens", together.tokens[0], beside.tokens[0]),
        ("log-probabilities", together.log_probs.processed[0], beside.log_probs.processed[0]),
        ("rounds", together.stats.rounds[0], beside.stats.rounds[0]),
    ):
        if (ours != theirs).any():
            raise AssertionError(f"against {adversary.name} row 0's {what} depend on its neighbours: {ours}, {theirs}.")
