"""Combined drafters: whose draft each row takes, what the others miss, and that nothing of it shows in the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import specjax
from specjax import Sampling, controllers, drafters, testing, verify

VOCAB = 13
PROMPTS = jnp.array([[1, 2, 3, 1, 2, 3, 1], [5, 6, 7, 8, 9, 10, 11], [4, 4, 4, 4, 4, 4, 4]])


def _combined(family, *others):
    model, params = tiny.model(family, vocab_size=VOCAB)
    drafter = drafters.first_of(drafters.prompt_lookup(n_min=1, n_max=2), *others, drafters.draft_model(model))
    return model, params, drafter


@pytest.mark.parametrize("family", ["table", "llama"])
def test_a_model_that_drafts_for_itself_is_right_wherever_it_drafts(family):
    """Catches a draft model that misses what others drafted, or keeps its own draft where theirs was accepted: drafting
    for itself, every token of its own must be accepted, and where it has no row to draft for it must not run."""
    model, params, drafter = _combined(family)
    out = specjax.generate(
        model, params, drafter, ((), params), PROMPTS, max_new_tokens=jnp.array([50, 41, 30]),
        controller=controllers.fixed(3), stop_tokens=[],
    )  # fmt: skip
    plain = specjax.autoregressive(model, params, PROMPTS, max_new_tokens=jnp.array([50, 41, 30]))
    assert out.new_tokens() == plain.new_tokens()
    drafted, accepted = np.asarray(out.stats.drafted_by), np.asarray(out.stats.accepted_by)
    assert drafted.shape == (3, 2)
    assert (drafted.sum(0) > 0).all()  # both took part
    assert (drafted.sum(1) == out.stats.drafted.sum(1)).all()
    assert (accepted[:, 1] == drafted[:, 1]).all()
    assert accepted[:, 0].sum() < drafted[:, 0].sum()


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_sampled_text_follows_the_distribution(rule):
    """Catches a one-hot draft that is verified as a drawn one, or the other way round, and noise that two drafters
    share. 20,000 texts of 4 tokens over three rounds, K = 2, false alarms 1e-6."""
    table = testing.random_table(jax.random.key(11), order=2, vocab_size=3, sharpness=1.5)
    model = testing.table_model(2, 3)
    store = drafters.Store.build([[1, 1, 2], [2, 0, 1, 1]], depth=3)
    drafter = drafters.first_of(
        drafters.prompt_lookup(n_min=2), drafters.suffix_store(n_min=2, vocab_size=3), drafters.draft_model(model)
    )
    out = specjax.generate(
        model, table, drafter, ((), store, -table), jnp.tile(jnp.array([[1, 2, 1, 2]]), (20_000, 1)),
        key=jax.random.key(3), max_new_tokens=4, sampling=Sampling(1.0), verifier=getattr(verify, rule)(),
        controller=controllers.fixed(2),
    )  # fmt: skip
    assert (np.asarray(out.stats.drafted_by).sum(0) > 1000).all()
    probs = testing.exact_sequence_probs(model, table, [1, 2, 1, 2], 4, sampling=Sampling(1.0))
    testing.assert_same_distribution(testing.count_sequences(out.tokens, 4, 4, 3), probs)


def test_a_row_is_what_it_is_alone():
    """Catches a row whose drafter, tokens or rounds depend on which drafters others need. Sampled, with rounds that
    draft nothing in between."""
    model, params, drafter = _combined("llama")
    options = {"max_new_tokens": 25, "sampling": Sampling(0.9), "controller": controllers.confidence(0.5, 3)}
    seeds = jnp.array([5, 6, 7])
    together = specjax.generate(model, params, drafter, ((), params), PROMPTS, seeds=seeds, **options)
    for row in range(3):
        one = slice(row, row + 1)
        alone = specjax.generate(model, params, drafter, ((), params), PROMPTS[one], seeds=seeds[one], **options)
        assert alone.new_tokens()[0] == together.new_tokens()[row]
        assert (alone.stats.drafted_by[0] == together.stats.drafted_by[row]).all()


def test_a_draft_model_that_no_row_needs_does_not_run():
    """Catches work in rounds that the lookup serves: a draft model of NaN costs its rows nothing where lookup drafts,
    and a controller that always drafts has no plain rounds, as there is always a draft."""
    model, params = tiny.model("table", vocab_size=VOCAB)
    calls = []

    def apply(params, tokens, *rest, **more):
        jax.debug.callback(lambda: calls.append(tokens.shape))
        return model.apply(params, tokens, *rest, **more)

    loud = model._replace(apply=apply)
    same = jnp.full_like(params, -9.0).at[..., 4].set(9.0)  # says 4 for ever
    drafter = drafters.first_of(drafters.prompt_lookup(n_min=2), drafters.draft_model(loud))
    out = specjax.generate(
        model, same, drafter, ((), same), PROMPTS[2:], max_new_tokens=41, controller=controllers.fixed(3)
    )
    jax.effects_barrier()
    assert out.stats.drafted_by.tolist() == [[30, 0]]
    assert len(calls) == 1  # the prompt
    for params, said in (
        ((same, ()), r"prompt_lookup has no parameters: pass \(\)"),
        (same, "first_of of 2 drafters takes a tuple of as many drafter_params"),
        (((),), "in the same order, got 1 of them"),
    ):
        with pytest.raises(ValueError, match=said):
            specjax.generate(model, same, drafter, params, PROMPTS[2:], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"suffix_store must be a drafters\.Store, got a tuple: make one"):
        specjax.generate(model, same, drafters.suffix_store(draw="mode"), (), PROMPTS[2:], max_new_tokens=4)
    with pytest.raises(ValueError, match="two or more Drafters"):
        drafters.first_of(drafter)
    with pytest.raises(ValueError, match=r"different vocabularies, of \[5, 13\] ids"):
        drafters.first_of(drafters.draft_model(model), drafters.draft_model(testing.table_model(1, 5)))
