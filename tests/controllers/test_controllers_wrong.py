"""Settings, profiles and controllers that are wrong: errors that say what was expected, what came and what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import profile

import specjax
from specjax import controllers, costs, testing, verify
from specjax.costs import Profile

CHEAP = profile()


def _write_with(**fields):
    model = testing.table_model(1, 8)
    table = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    controller = controllers.additive(3, 1)._replace(**fields)
    drafter = specjax.drafters.draft_model(model)
    specjax.generate(model, table, drafter, table, jnp.ones((3, 2), jnp.int32), max_new_tokens=4, controller=controller)


def test_any_kind_of_number_is_a_share():
    """Catches NumPy's and JAX's numbers taken for nonsense, or for keys that have no hash."""
    assert controllers.throughput(CHEAP, prior=np.float32(0.5)) is controllers.throughput(CHEAP, prior=0.5)
    assert controllers.confidence(jnp.float32(0.5), np.int64(4)) is controllers.confidence(0.5, 4)
    assert controllers.additive(jnp.int32(4), np.array(2)) is controllers.additive(4, 2)
    assert verify.top_k_lossy(jnp.int32(2)) is verify.top_k_lossy(2)
    assert verify.typical_lossy(jnp.float32(0.5)) is verify.typical_lossy(0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: controllers.confidence(1.2), r"threshold must be in 0\.\.1.*got 1\.2"),
        (lambda: controllers.confidence("a"), r"threshold must be a number, in 0\.\.1.*got 'a'"),
        (lambda: controllers.fixed("a"), "draft_len must be a whole number, .*got 'a'"),
        (lambda: controllers.fixed([3]), r"draft_len must be a whole number, .*got \[3\]"),
        (lambda: verify.typical_lossy(0.0), r"epsilon must be in \(0, 1\], got 0\.0"),
        (lambda: verify.top_k_lossy("a"), "k must be a whole number, 1 or more, got 'a'"),
        (lambda: testing.check_controller(controllers.fixed(2), samples=-1), "samples must be 100 or more, got -1"),
        (lambda: testing.check_verifier(verify.block(), samples="a"), "samples must be a whole number, 100 or more"),
        (lambda: testing.check_verifier(verify.block(), false_alarm=2.0), "false_alarm must be between 0 and 1"),
        (lambda: testing.check_model(testing.table_model(1, 4), None, tolerance=-1.0), "tolerance must be 0 or more"),
        (lambda: controllers.confidence(0.5, 0), r"longest must be in 1\.\.65535"),
        (lambda: controllers.additive(4, 5), r"start must be in 1\.\.4, got 5"),
        (lambda: controllers.additive(4, up=-1), "up must be .*, got -1"),
        (lambda: controllers.throughput(CHEAP, prior=2.0), "prior must be a share in 0..1, got 2.0"),
        (lambda: controllers.throughput(CHEAP, prior=None), "prior must be a number, a share in 0..1"),
        (lambda: controllers.throughput(CHEAP, prior=float("nan")), "prior must be a share"),
        (lambda: controllers.throughput(None), "must be a specjax.costs.Profile, .* got NoneType"),
        (lambda: controllers.throughput("profile.json"), r"costs.load\(path\) returns; got str"),
        (lambda: controllers.throughput(CHEAP._replace(buckets=[0, 1])), "are tuples"),
        (lambda: _write_with(buckets=(4, 2)), r"ascend, .* got \(4, 2\)"),
        (lambda: _write_with(buckets=()), r"ascend, .* got \(\)"),
        (lambda: _write_with(buckets=[1, 2]), r"must be a tuple .* got \[1, 2\]"),
        (
            lambda: _write_with(draft_len=lambda state, rows: rows.lengths.astype(jnp.float32)),
            r"int32 \[3\], .* got float32 \[3\]",
        ),
        (lambda: _write_with(draft_len=lambda state, rows: jnp.int32(2)), r"one number a row; got int32 \[\]"),
        (lambda: _write_with(update=lambda state, info: 1.0), "of the form of init's, int32"),
        (lambda: controllers.throughput(Profile("x", (0, 1), ())), "needs costs"),
        (lambda: controllers.throughput(profile((1.0, 0.0))), "0 or less"),
        (lambda: controllers.throughput(profile((1.0, float("nan")))), "not finite"),
        (lambda: costs.from_json({"format": 9}), "this profile has format 9, this version reads"),
    ],
)
def test_bad_settings_say_what_is_wrong(make, said):
    """Catches silent nonsense."""
    with pytest.raises(ValueError, match=said):
        make()
