"""The one path from logits to a distribution, against a float64 reference that sorts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import noise
from specjax.sampling import first_best, per_row, process, sample
from specjax.testing import numpy_probs
from specjax.types import Sampling

WIDTH = 12


@jax.jit
def _probs(logits, sampling):
    return jax.nn.softmax(process(logits[:, None], sampling, WIDTH), -1)[:, 0]


@pytest.mark.parametrize(
    "row", [[0.0, 3.0, 3.0, -1.0], [-np.inf] * 4, [-np.inf, -2.0, -2.0, np.inf], [-0.0, 0.0, 0.0, -5.0]]
)
def test_first_best_is_the_first(row):
    """Catches the last of equal logits, and a column that no vocabulary has."""
    assert int(jax.jit(first_best)(jnp.asarray([row]))[0]) == int(np.argmax(row))


def test_first_best_of_nan_is_some_column():
    """Catches an id past the vocabulary from logits that the row's status will condemn anyway."""
    assert 0 <= int(jax.jit(first_best)(jnp.asarray([[1.0, np.nan, 2.0]]))[0]) < 3


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    # Far enough apart that float32 and float64 agree on which are equal.
    logits=st.lists(st.integers(-2048, 2048), min_size=WIDTH, max_size=WIDTH, unique=True),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, WIDTH + 3),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_distribution_matches_a_sorting_reference(logits, temperature, top_k, top_p, min_p):
    """Catches a wrong threshold, order of filters, or off-by-one in the bisection."""
    host = np.array(logits, np.float32) / 256
    rows = per_row(Sampling(temperature, top_k, top_p, min_p), 1)
    found = np.asarray(_probs(jnp.asarray(host)[None], rows))[0]
    wanted = numpy_probs(host, Sampling(temperature, top_k, top_p, min_p))
    mass = np.sort(numpy_probs(host, Sampling(max(temperature, 1e-3), top_k)))[::-1].cumsum()
    if temperature > 0 and (np.abs(mass - top_p) < 1e-5).any():
        return  # float32 and float64 may cut a mass at exactly top_p on either side
    probs = numpy_probs(host, Sampling(max(temperature, 1e-3), top_k))
    if temperature > 0 and (np.abs(probs - min_p * probs.max()) < 1e-6 * probs.max()).any() and min_p > 0:
        return
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_the_distribution_is_the_same_without_jit():
    """Catches a loop whose body takes its index for an array: under jax.disable_jit() it is a Python int."""
    logits = jnp.asarray([[0.0, 3.0, 1.0, -1.0, 2.5, 0.5, *[-4.0] * (WIDTH - 6)]])
    rows = per_row(Sampling(1.0, top_k=4, top_p=0.9), 1)
    with jax.disable_jit():
        found = process(logits[:, None], rows, WIDTH)
    np.testing.assert_allclose(jax.nn.softmax(found[:, 0]), _probs(logits, rows), rtol=1e-6)


def test_rows_have_their_own_settings():
    """Catches one row's temperature or filter applied to another, and mixing greedy with sampled rows."""
    logits = jnp.broadcast_to(jnp.linspace(0, 3, WIDTH)[None], (4, WIDTH))
    settings_ = [(0.0, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (0.7, 0, 0.6, 0.0), (1.5, 0, 1.0, 0.4)]
    columns = [jnp.array(column) for column in zip(*settings_, strict=True)]
    probs = np.asarray(_probs(logits, per_row(Sampling(*columns), 4)))
    for row, (temperature, top_k, top_p, min_p) in enumerate(settings_):
        wanted = numpy_probs(np.asarray(logits[row]), Sampling(temperature, top_k, top_p, min_p))
        np.testing.assert_allclose(probs[row], wanted, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_no_temperature_inverts_the_logits(temperature):
    """Known bug 6: padding rows with temperature -1 turned the least likely token into the most likely."""
    logits = jnp.array([[0.0, 5.0, 1.0] + [-1.0] * (WIDTH - 3)])
    probs = _probs(logits, per_row(Sampling(jnp.array([temperature])), 1))
    assert np.asarray(probs)[0].argmax() == 1
    assert float(probs[0, 1]) == 1.0


def test_ties_at_a_threshold_are_all_kept():
    """Catches a bisection that drops one of several equal logits."""
    logits = jnp.array([[1.0, 1.0, 1.0] + [0.0] * (WIDTH - 3)])
    probs = np.asarray(_probs(logits, per_row(Sampling(1.0, top_k=2), 1)))[0]
    np.testing.assert_allclose(probs[:3], 1 / 3, rtol=1e-6)
    assert probs[3:].sum() == 0


def test_padded_columns_are_never_drawn():
    """Known bug 7: ids from padded vocabulary columns, here with the largest logits of all."""
    logits = jnp.zeros((512, 1, 8)).at[..., 5:].set(30.0)
    for temperature in (0.0, 1.0):
        rows = per_row(Sampling(temperature), 512)
        keys = noise.row_keys(jax.random.key(0), jnp.arange(512))[:, 0]
        assert int(sample(keys, process(logits, rows, 5)[:, 0], rows).max()) < 5


def test_masked_logits_stay_masked():
    """Catches -inf logits (a grammar's mask) turning into NaN."""
    logits = jnp.full((1, WIDTH), -jnp.inf).at[0, 3].set(0.0).at[0, 4].set(1.0)
    probs = np.asarray(_probs(logits, per_row(Sampling(1.0, top_k=5, top_p=0.99, min_p=0.01), 1)))[0]
    np.testing.assert_allclose(probs[3:5], np.exp([0, 1]) / np.exp([0, 1]).sum(), rtol=1e-6)
    assert probs.sum() == pytest.approx(1)


def test_the_vocabulary_is_never_sorted():
    """Sorting was half of a verification step in one engine."""
    rows = per_row(Sampling(1.0, 5, 0.9, 0.1), 2)
    text = jax.jit(lambda x: process(x, rows, 50_000)).lower(jnp.zeros((2, 1, 50_000))).as_text()
    assert "sort" not in text
    assert "top_k" not in text


def test_samples_follow_the_distribution():
    """Catches wrong noise. Chi-square over 40,000 draws, false alarms 1e-6."""
    from specjax.testing import assert_same_distribution

    count = 40_000
    logits = jnp.broadcast_to(jnp.array([0.3, -1.0, 2.0, 0.0])[None], (count, 4))
    keys = noise.row_keys(jax.random.key(7), jnp.arange(count))[:, 0]
    tokens = np.asarray(sample(keys, logits, per_row(Sampling(1.0), count)))
    assert_same_distribution(np.bincount(tokens, minlength=4), np.asarray(jax.nn.softmax(logits[0])))


def test_addresses_never_share_noise():
    """Known bug 1: one stream of noise for several roles, rounds or rows."""
    keys = noise.row_keys(jax.random.key(0), jnp.arange(5))
    drawn = [noise.uniforms(noise.derive(keys, role, jnp.int32(index)), 4) for role in noise.Role for index in range(6)]
    values = np.concatenate([np.asarray(draw).ravel() for draw in drawn])
    assert len(np.unique(values)) == len(values)
