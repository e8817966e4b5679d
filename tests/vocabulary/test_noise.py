"""Keys of every implementation that this JAX has: rows of their own, the right distribution, one answer to one seed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import controllers, noise, testing, verify

IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]
VOCAB = 997
MODEL, UNIFORM = testing.table_model(1, VOCAB), jnp.zeros((VOCAB + 1, VOCAB))
PROMPTS, SEEDS = jnp.array([[1, 2], [3, 4], [5, 6], [1, 2]]), jnp.array([7, 8, 9, 10])
LIMITS = jnp.array([1, 14, 14, 9])
# The distribution of this pair's texts is uniform, so that a number drawn twice is seen: 46 tokens of 997 ids.
WAYS = {
    "plain": None,
    "rejection": verify.rejection(),
    "block": verify.block(),
    "coupled": verify.coupled(),
}


def _texts(way, key, rows):
    options = {
        "key": key, "seeds": SEEDS[rows], "max_new_tokens": LIMITS[rows], "capacity": 16,
        "sampling": specjax.Sampling(1.0),
    }  # fmt: skip
    if WAYS[way] is None:
        return specjax.autoregressive(MODEL, UNIFORM, PROMPTS[rows], **options).new_tokens()
    draft = UNIFORM.at[:, : VOCAB // 2].add(1.0)  # another distribution, so that some draft tokens are rejected
    return specjax.generate(
        MODEL, UNIFORM, specjax.drafters.draft_model(MODEL), draft, PROMPTS[rows], verifier=WAYS[way],
        controller=controllers.fixed(2), **options,
    ).new_tokens()  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_rows_have_noise_of_their_own(way, implementation):
    """Catches keys that do not map over rows: with rbg keys every row drew the noise of the first, and the same noise
    in every round after the first row had ended. Rows alone and in company, all tokens apart, other seeds other texts;
    coupled verification gives plain decoding's tokens."""
    key = jax.random.key(3, impl=implementation)
    together = _texts(way, key, jnp.arange(4))
    assert [len(row) for row in together] == LIMITS.tolist()
    for row in range(1, 4):
        assert len(set(together[row])) >= len(together[row]) - 1
        assert len(set(together[row]) & set(together[row - 1])) <= 2
    assert _texts(way, key, jnp.array([2]))[0] == together[2]
    assert _texts(way, jax.random.key(4, impl=implementation), jnp.arange(4)) != together
    if way == "coupled":
        assert together == _texts("plain", key, jnp.arange(4))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])  # tests/testing/test_exactness.py has the default
def test_the_exactness_suite_under_other_implementations(implementation):
    """Catches a bias that comes from the caller's keys, or from a default that programs for TPUs often set. Sequences
    of 4 tokens in up to 3 rounds, 7 adversaries, 3 settings, K = 1 and 3: 42 chi-square tests of 4,000 sequences each
    for both rules, false alarms 1e-6 a test. The coupled rule is above, token by token."""
    with jax.default_prng_impl(implementation):
        for rule in (verify.rejection(), verify.block()):
            assert len(testing.check_verifier(rule, samples=4000)) == 56
        table = testing.random_table(jax.random.key(11), order=2, vocab_size=4, sharpness=1.5)
        model, prompts = testing.table_model(2, 4), jnp.tile(jnp.array([[1, 2]]), (20_000, 1))
        sampling = specjax.Sampling(1.0)
        out = specjax.autoregressive(model, table, prompts, key=jax.random.key(1), max_new_tokens=3, sampling=sampling)
        probs = testing.exact_sequence_probs(model, table, [1, 2], 3, sampling=sampling)
        testing.assert_same_distribution(testing.count_sequences(out.tokens, 2, 3, 4), probs)


def test_a_key_counts_with_all_its_bits():
    """Catches half of a key thrown away: keys that differ in any word are others; legacy ones are as typed ones."""
    words = np.arange(4, dtype=np.uint32)
    keys = {tuple(np.asarray(jax.random.key_data(noise.counter_based(jnp.asarray(words + add))))) for add in np.eye(4)
            .astype(np.uint32)}  # fmt: skip
    assert len(keys) == 4
    for implementation in IMPLEMENTATIONS:
        key = jax.random.key(5, impl=implementation)
        ours = [jax.random.key_data(noise.row_keys(one, jnp.arange(2))) for one in (key, jax.random.key_data(key))]
        np.testing.assert_array_equal(*ours)


def test_no_key_is_the_same_under_every_default():
    """Catches a default key whose numbers depend on a setting of the process."""
    texts = []
    for implementation in IMPLEMENTATIONS:
        with jax.default_prng_impl(implementation):
            texts.append(_texts("plain", None, jnp.arange(4)))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_rounds_without_a_draft_do_not_count_for_others(rule):
    """Catches a round in which nothing happened, and that only company made a round: it moved a row on to the noise of
    the next. A drafter that finds something at some lengths of a text; rows alone and in company, sampled."""
    size = 13
    model = testing.table_model(2, size)
    params = testing.random_table(jax.random.key(0), order=2, vocab_size=size, sharpness=2.0)

    def propose(params, state, context, plan):
        rows = context.rows
        found = jnp.where(rows.lengths % 3 == 0, plan.lengths, 0)
        tokens = jnp.repeat(rows.lengths[:, None] % size, plan.longest, 1)
        return specjax.Draft(tokens, found, None), state

    seldom = specjax.Drafter(propose)
    controller = controllers.fixed(2)._replace(buckets=(0, 2))
    prompts, seeds = jnp.array([[1, 2, 3, 4, 5, 6]]).repeat(12, 0), jnp.arange(12)
    lengths, limits = jnp.array([1, 2, 3, 4, 5, 6] * 2), jnp.array([20] * 11 + [5])

    def texts(rows):
        return specjax.generate(
            model, params, seldom, None, prompts[rows], lengths[rows], seeds=seeds[rows], max_new_tokens=limits[rows],
            capacity=30, sampling=specjax.Sampling(1.0), verifier=getattr(verify, rule)(), controller=controller,
        ).new_tokens()  # fmt: skip

    together = texts(jnp.arange(12))
    assert [texts(jnp.array([row]))[0] for row in range(12)] == together
