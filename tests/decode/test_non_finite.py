"""Numbers that are not finite in places that do not count: rejected draft tokens, padding, dead ends ahead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import specjax
from specjax import Status, controllers, testing, verify
from specjax.testing import constant_drafter

PROMPTS, LENGTHS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 0]]), jnp.array([4, 3])
RULES = {"rejection": verify.rejection(), "block": verify.block(), "coupled": verify.coupled()}
NEVER = 7  # an id that the target never emits here


def _generate(model, params, drafter, drafter_params, **options):
    sampling = specjax.Sampling(options.pop("temperature", 1.0), bad_words=[NEVER])
    return (
        specjax.generate(model, params, drafter, drafter_params, PROMPTS, LENGTHS, max_new_tokens=12,
                         sampling=sampling, controller=controllers.fixed(3), **options),
        specjax.autoregressive(model, params, PROMPTS, LENGTHS, max_new_tokens=12, sampling=sampling),
    )  # fmt: skip


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rejected_token_leaves_no_trace(poison, temperature):
    """Catches a rejected draft token whose embedding is NaN or infinite: 0 times its values is NaN, in the places
    before it and, from the cache, in every round after."""
    model, params = tiny.model("llama")
    embedding = params["model"]["embed_tokens"]["weight"]
    embedding[...] = embedding[...].at[NEVER].set(poison)
    for rule in RULES.values() if temperature else [verify.greedy()]:
        out, plain = _generate(model, params, constant_drafter(NEVER), (), verifier=rule, temperature=temperature)
        assert (out.status == Status.LENGTH).all()
        if rule.coupled or not temperature:
            assert out.new_tokens() == plain.new_tokens()


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_draft_model_with_more_columns(rule):
    """Catches a fallback that covers padding: an id that no vocabulary has, drafted, has no embedding in the target."""
    model, params = tiny.model("llama")
    draft = testing.table_model(1, tiny.VOCAB, tiny.VOCAB + 50)
    table = jnp.full((tiny.VOCAB + 1, tiny.VOCAB + 50), jnp.nan)
    out, plain = _generate(model, params, specjax.drafters.draft_model(draft), table, verifier=RULES[rule])
    assert (out.status == Status.LENGTH).all()
    if rule == "coupled":
        assert out.new_tokens() == plain.new_tokens()


def _nothing_after_two(logits, tokens, length):
    return jnp.where(tokens[length - 1] == 2, -jnp.inf, logits)


@pytest.mark.parametrize("logits_size", [4, 9])
@pytest.mark.parametrize("rule", RULES)
def test_a_dead_end_ahead_changes_no_distribution(rule, logits_size):
    """Catches NaN from a place without a distribution in rules that judge the whole draft at once, and a draft from
    padding columns there. A grammar that allows nothing after the id 2; texts of 4 tokens, K = 3, chi-square over
    20,000 texts, those that end early a cell of their own; false alarms 1e-6."""
    model, draft = testing.table_model(1, 4), testing.table_model(1, 4, logits_size)
    table = testing.random_table(jax.random.key(0), order=1, vocab_size=4)
    params = jnp.pad(-table, ((0, 0), (0, logits_size - 4)), constant_values=9.0)
    sampling = specjax.Sampling(1.0)
    out = specjax.generate(
        model, table, specjax.drafters.draft_model(draft), params, jnp.tile(jnp.array([[1, 3]]), (20_000, 1)),
        max_new_tokens=4, sampling=sampling, verifier=RULES[rule], controller=controllers.fixed(3),
        processor=_nothing_after_two,
    )  # fmt: skip
    probs = testing.exact_sequence_probs(model, table, [1, 3], 4, sampling=sampling, processor=_nothing_after_two)
    whole = np.asarray(out.status == Status.LENGTH)
    ended = np.asarray(out.status == Status.DEAD_END)
    assert (whole | ended).all()
    last = np.take_along_axis(np.asarray(out.tokens), np.asarray(out.lengths)[:, None] - 1, 1)[:, 0]
    assert (last[ended] == 2).all()
    counts = testing.count_sequences(np.asarray(out.tokens)[whole], 2, 4, 4).ravel()
    testing.assert_same_distribution(np.append(counts, ended.sum()), np.append(probs.ravel(), 1 - probs.sum()))
    early = np.asarray(out.lengths)[ended] - 2  # tokens before the end, 1 to 4
    first_two = np.bincount(early, minlength=5)[1] / 20_000
    expected = float(jax.nn.softmax(table[3])[2])
    assert abs(first_two - expected) < 5.5 * np.sqrt(expected * (1 - expected) / 20_000)  # false alarm 4e-8
