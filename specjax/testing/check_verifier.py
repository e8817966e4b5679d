"""The contract of a Verifier: whole sequences over several rounds follow the target's law, whatever the drafter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specjax import controllers
from specjax.decode import autoregressive, generate
from specjax.testing.adversaries import adversaries
from specjax.testing.laws import assert_same_law, count_sequences, exact_sequence_law
from specjax.testing.tables import random_table, table_model
from specjax.types import Sampling, Verifier

_VOCAB, _ORDER, _LENGTH, _PROMPT = 3, 2, 4, [1, 2]
_SETTINGS = {
    "temperature 1": Sampling(1.0),
    "temperature 0.7, top-p 0.9": Sampling(0.7, top_p=0.9),
    "penalties": Sampling(1.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
}


def check_verifier(
    verifier: Verifier, *, lossless: bool = True, samples: int = 20_000, false_alarm: float = 1e-6
) -> list[str]:
    """Checks `verifier` on a target that can be enumerated, against drafters made to break it.

    Greedy output must equal greedy decoding. Where `lossless`, sequences of 4 tokens are drawn at three settings with
    every adversary, 1 and 3 draft tokens a round (3 rounds and more), and compared with their exact law by a chi-square
    test; `samples` sequences and at most `false_alarm` false alarms a case.

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
    7
    """
    model = table_model(_ORDER, _VOCAB)
    table = random_table(jax.random.key(11), order=_ORDER, vocab_size=_VOCAB, sharpness=1.5)
    done = []
    for adversary in adversaries(table, _VOCAB):
        _check_greedy(verifier, model, table, adversary)
        done.append(f"greedy against {adversary.name}")
    if verifier.greedy_only or not lossless:
        return done
    for setting, sampling in _SETTINGS.items():
        law = exact_sequence_law(table, _PROMPT, _LENGTH, _VOCAB, sampling=sampling)
        for adversary in adversaries(table, _VOCAB):
            for draft_len in (1, 3):
                case = f"{setting} against {adversary.name}, K = {draft_len}"
                out = generate(
                    model, table, adversary.drafter, adversary.params, jnp.tile(jnp.array([_PROMPT]), (samples, 1)),
                    key=jax.random.key(2024), max_new_tokens=_LENGTH, sampling=sampling, verifier=verifier,
                    controller=controllers.fixed(draft_len),
                )  # fmt: skip
                try:
                    counts = count_sequences(out.tokens, len(_PROMPT), _LENGTH, _VOCAB)
                    assert_same_law(counts, law, false_alarm=false_alarm)
                except AssertionError as error:
                    raise AssertionError(f"{case}: {error}") from None
                done.append(case)
    return done


def _check_greedy(verifier: Verifier, model, table, adversary) -> None:
    prompts, lengths = jnp.array([[1, 2, 0], [2, 0, 0], [0, 1, 1]]), jnp.array([2, 1, 3])
    plain = autoregressive(model, table, prompts, lengths, max_new_tokens=12).new_tokens()
    out = generate(
        model, table, adversary.drafter, adversary.params, prompts, lengths, max_new_tokens=12, verifier=verifier,
        controller=controllers.fixed(3),
    )  # fmt: skip
    if out.new_tokens() != plain:
        raise AssertionError(f"greedy against {adversary.name}: {out.new_tokens()}, greedy decoding gives {plain}.")
