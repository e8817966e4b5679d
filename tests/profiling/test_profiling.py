"""Profiles: measured numbers that make sense, kept and found again; thresholds that cost least."""

from __future__ import annotations

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import profile as made_up

import specjax
from specjax import controllers, costs, testing
from specjax.costs import Costs, Profile
from specjax.profiling import timed_loops

MODEL = testing.table_model(1, 8)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
PAIR = (MODEL, TABLE, specjax.drafters.draft_model(MODEL), TABLE)


def test_a_profile_is_measured_once_and_kept(tmp_path, monkeypatch):
    """Catches a cache that is not read, one that is read for other settings, and a broken file that ends it all."""
    options = {"batch_sizes": (1, 2), "contexts": (8, 16), "longest": 3, "repeats": 1, "cache": tmp_path}
    found = specjax.profile(*PAIR, **options)
    assert [(part.batch, part.context) for part in found.costs] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert found.device == jax.devices()[0].device_kind
    assert found.buckets == (0, 1, 2, 3)
    for part in found.costs:
        assert part.plain > 0 < part.rounds[0]
        assert list(part.rounds) == sorted(part.rounds)
        assert part.drafts[0] == 0
        assert all(seconds >= 0 for seconds in part.verification())
    (file,) = tmp_path.iterdir()
    assert costs.load(file) == found

    calls = []
    time = timed_loops.Bench.time
    monkeypatch.setattr(timed_loops.Bench, "time", lambda *args: calls.append(1) or time(*args))
    assert specjax.profile(*PAIR, **options) == found
    assert calls == []
    file.write_text("{}")
    assert specjax.profile(*PAIR, **options).buckets == found.buckets
    assert len(calls) == 4
    specjax.profile(*PAIR, **{**options, "longest": 1, "contexts": (8,), "batch_sizes": (1,)})
    assert len(list(tmp_path.iterdir())) == 2


def _seconds_by_count(bench, run, state, count):
    if run is not timed_loops._rounds:
        return 1.0 if run is timed_loops._steps else 0.1
    total = {}
    for rounds in (1, count):
        counted = jax.device_get(bench._call(run, state, rounds).stats)
        assert counted.rounds.tolist() == [rounds]
        by_longest = counted.by_longest[0]
        total[rounds] = float(by_longest @ (1 + np.arange(len(by_longest)) / 2) + 2 * (counted.switches[0] // 2))
    return (total[count] - total[1]) / (count - 1)


def test_what_going_to_drafts_and_back_costs_is_found(monkeypatch):
    """Catches changes that are counted wrong: by a made-up clock a round takes 1 + K/2, and ending drafts 2."""
    monkeypatch.setattr(timed_loops.Bench, "_seconds", _seconds_by_count)
    (found,) = specjax.profile(*PAIR, longest=3, repeats=1).costs
    assert found.in_steps() == pytest.approx((1.0, 1.5, 2.0, 2.5))
    assert found.change == pytest.approx(2.0)


def test_a_call_and_its_first_round_are_not_counted(monkeypatch):
    """Catches rounds that seem dearer than they are: by a made-up clock a call takes 5, its first round 3, others 2."""
    monkeypatch.setattr(
        timed_loops.Bench, "_time", lambda bench, run, state, count, calls: calls * (5.0 + 2.0 * count + (count > 0))
    )
    (found,) = specjax.profile(*PAIR, longest=3, repeats=1).costs
    assert (found.plain, found.rounds[0]) == (2.0, 2.0)


def test_a_slow_minute_is_not_compared_with_a_fast_one(monkeypatch):
    """Catches ratios of medians: by a made-up clock each turn is slower than the last, and one has a hiccup."""
    calls = []

    def seconds(bench, run, state, count):
        # Three groups, of three jobs, of three and of two, each with a plain step: three turns of each.
        group = len(calls) // 12
        turn = (len(calls) - 12 * group) // (4, 4, 3)[group]
        calls.append(run)
        hiccup = 10.0 if turn == 1 and run is timed_loops._rounds else 1.0
        return (turn + 1) * (group + 1) * hiccup

    monkeypatch.setattr(timed_loops.Bench, "_seconds", seconds)
    (found,) = specjax.profile(*PAIR, longest=3, repeats=3).costs
    assert (len(calls), calls.count(timed_loops._steps)) == (3 * 11, 3 * 3)
    assert found.plain == 3.0  # the median of 1, 2, 3 times 1, 2, 3
    assert found.rounds == (3.0,) * 4
    assert found.change == 0.0


@pytest.mark.parametrize(("positions", "change"), [(None, 2.0), (64, 2.0), (34, 0.0)])
def test_loops_end_before_the_positions_do(positions, change, monkeypatch):
    """Catches rounds that are timed although their rows had ended: by the clock above, with rows that have little room.
    Where not even two changes have room, none is measured."""
    monkeypatch.setattr(timed_loops.Bench, "_seconds", _seconds_by_count)
    model = MODEL._replace(max_positions=positions)
    (found,) = specjax.profile(model, *PAIR[1:], longest=5, repeats=1, contexts=(20,)).costs
    assert found.in_steps() == pytest.approx((1.0, 1.5, 2.0, 2.5, 3.5, 3.5))
    assert found.change == pytest.approx(change)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"longest": 0}, r"longest must be in 1\.\.65535"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"buckets": (1, 2), "longest": 2}, "ascend from 0 to longest=2"),
        ({"batch_sizes": ()}, "numbers from 1 on"),
    ],
)
def test_bad_arguments_say_what_is_wrong(options, said):
    """Catches a profile that cannot be used."""
    with pytest.raises(ValueError, match=said):
        specjax.profile(*PAIR, **options)
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda params: specjax.profile(MODEL, params, *PAIR[2:]))(TABLE)
    with pytest.raises(ValueError, match="cannot be traced"):  # closed over, parameters are plain arrays
        jax.jit(lambda: specjax.profile(*PAIR).costs[0].plain)()


def test_foreign_profiles_are_told(caplog):
    """Catches costs of another machine, or of other batches, that are used without a word."""
    with caplog.at_level(logging.WARNING, "specjax"):
        controllers.throughput(made_up(batch=2)).init(5)
    assert "this profile is of no device" in caplog.text
    assert "5 rows, but the profile is of 2 to 2" in caplog.text


def test_a_threshold_for_good_drafts_and_for_bad_ones():
    """Catches a calibration that takes the dearest, or runs one threshold for all: a draft that is always right should
    draft on, one that is always wrong should stop at once."""
    table = made_up((1.0, 1.3, 1.6, 1.9))
    good = specjax.calibrate(*PAIR, jnp.array([[1, 2]]), profile=table, thresholds=(0.0, 1.0), max_new_tokens=32)
    bad = specjax.calibrate(
        *PAIR[:3], -TABLE, jnp.array([[1, 2]]), profile=table, thresholds=(0.0, 1.0), max_new_tokens=32
    )
    assert (good.threshold, bad.threshold) == (0.0, 1.0)
    assert good.speedups[0] > 1.2 * good.speedups[1]
    with pytest.raises(ValueError, match="one or more probabilities"):
        specjax.calibrate(*PAIR, jnp.array([[1, 2]]), profile=table, thresholds=())


def test_profiles_survive_a_file(tmp_path):
    """Catches a number lost on the way, half-written files, and files that are something else."""
    table = made_up()._replace(about=(("jax", "1"),))
    table.save(tmp_path / "new" / "profile.json")
    assert costs.load(tmp_path / "new" / "profile.json") == table
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["profile.json"]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        costs.load(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist: make a profile"):
        costs.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="new is no file"):
        costs.load(tmp_path / "new")
    (tmp_path / "binary.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"binary\.json is not JSON"):
        costs.load(tmp_path / "binary.json")
    (tmp_path / "empty.json").write_text(json.dumps({**table.as_json(), "buckets": []}))
    with pytest.raises(ValueError, match=r"empty\.json: .* ascending buckets from 0 on"):
        costs.load(tmp_path / "empty.json")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_sizes": ()}, r"batch_sizes, .* as in \(1, 4\); got \(\)"),
        ({"batch_sizes": 2}, "batch_sizes, .* got 2"),
        ({"batch_sizes": (1.5,)}, r"batch_sizes, .* got \(1.5,\)"),
        ({"contexts": 64}, "contexts, .* got 64"),
        ({"contexts": (1_000_000,)}, "the target has places for 256 tokens"),
        ({"buckets": ()}, "buckets must ascend"),
        ({"buckets": (0, "a")}, "buckets must ascend from 0 to longest=2, got .*'a'"),
        ({"buckets": 3}, "buckets must ascend .* got 3"),
        ({"batch_sizes": (True,)}, r"batch_sizes, .* got \(True,\)"),
    ],
)
def test_bad_settings_are_refused_at_once(given, said):
    """Catches an hour of compiling for a context that the model has no places for, and errors from deep inside."""
    model, params, *draft = PAIR
    with pytest.raises(ValueError, match=said):
        specjax.profile(model._replace(max_positions=256), params, *draft, longest=2, **given)


def test_costs_between_what_was_measured():
    """Catches interpolation along the wrong axis."""
    four = [
        Costs(batch, context, batch * 1.0, (batch * context * 1.0, 2.0 * batch * context), (0.0, 0.1), 0.0)
        for batch in (1, 5)
        for context in (100, 200)
    ]
    table = Profile("x", (0, 1), tuple(four))
    assert table.at(3, 150).rounds == (450.0, 900.0)
    assert table.at(1, 50)._replace(context=100) == four[0]
    assert table.at(9, 900).rounds == four[3].rounds
