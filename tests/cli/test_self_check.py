"""The self-check of `specjax doctor`: it can fail, it ends in time, and it says what it left out."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from healthy import HEALTHY, shown
from typer.testing import CliRunner

import specjax
from specjax import models, testing, text
from specjax.cli import comparison, main
from specjax.cli.comparison import Comparison, Setting
from specjax.cli.doctor import display as doctor_display
from specjax.cli.doctor import problems, self_check
from specjax.cli.load_pair import Pair
from specjax.types import Verdict, Verifier


@pytest.fixture(scope="module")
def small_pair():
    """A pair that compiles in no time, in bfloat16, with the shipped tokenizer."""
    config = tiny.config("llama", 4096)

    def sharp(seed):
        loaded = models.random(config, jax.random.key(seed))
        scaled = jax.tree.map(lambda leaf: leaf * 12 if leaf.ndim > 1 else leaf, loaded.params)
        return loaded._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), scaled))

    return Pair(sharp(0), sharp(1), text.load_tokenizer(models.PRETRAINED / "target"))


@pytest.fixture
def run(monkeypatch, small_pair):
    """`specjax doctor` on the small pair, with less to measure."""
    setting = Setting((3,), prompts=2, context=16, max_new_tokens=32, repeats=1)
    whole = self_check.run
    monkeypatch.setattr(main, "load_pair", lambda *args: small_pair)
    monkeypatch.setattr(self_check, "run", lambda pair, busy: whole(pair, busy, setting))

    def command(*arguments):
        return CliRunner().invoke(main.app, ["doctor", "--no-cache", *arguments])

    return command


def test_a_slow_machine_is_told_what_was_left_out(small_pair):
    """Catches minutes of a doctor where the machine is slow, and a speed that is silently missing."""
    setting = Setting((3,), prompts=2, context=16, max_new_tokens=32, repeats=3)
    found = self_check.run(small_pair, lambda what: contextlib.nullcontext(), setting, budget=0.0)
    assert [finding.check for finding in found.findings] == ["greedy speculation against plain decoding, float32"]
    assert "of 1 texts" in found.findings[0].detail  # the others had no time
    assert found.left_out == ["sampled speculation against its exact distribution", "time of steps and rounds"]
    assert (found.passed, found.pace) == (True, None)
    assert f"No time was left for: {'; '.join(found.left_out)}." in shown(doctor_display.result(found))
    assert doctor_display.as_json(problems.Report(HEALTHY, [], found))["check"]["left_out"] == found.left_out


def test_turns_end_with_the_time(monkeypatch):
    """Catches repetitions that go on past the time of the whole check."""
    timed = []
    monkeypatch.setattr(comparison, "time_generations", lambda *given: timed.append(given))
    whole: Any = Comparison({comparison.PLAIN: None, 3: None}, [], Setting(repeats=5), {}, {})  # type: ignore[dict-item]
    found = comparison.time_all(whole, lambda what: contextlib.nullcontext(), enough=lambda turns: turns == 2)
    assert [len(turns) for turns in found.values()] == [2, 2]


def test_a_healthy_machine(run):
    """Catches a self-check that fails where nothing is wrong, and JSON that a script cannot read."""
    result = run("--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["healthy"] is said["check"]["passed"] is True
    assert [finding["passed"] for finding in said["check"]["findings"]] == [True] * 3
    assert said["devices"][0]["platform"] == said["backend"] == "cpu"
    assert said["packages"]["jax"] == jax.__version__
    assert said["check"]["compiling_seconds"] > 0 < said["check"]["measuring_seconds"]
    pace = said["check"]["speed"]  # null where the machine was too busy to tell
    assert pace is None or (
        1 <= pace["tokens_per_round"] <= 4 and pace["verdict"].startswith(("Speculation ", "This machine"))
    )
    assert pace is None or pace["dtype"] == "bfloat16"  # what the pair is in; tokens were compared in float32


def _keeps_all() -> Verifier:
    """Wrong in the plainest way: every draft token is kept."""

    def verify(context, draft, target):
        probs = jnp.take_along_axis(target.probs, draft.lengths[:, None, None], 1)[:, 0]
        return Verdict(draft.lengths, jnp.argmax(probs, -1).astype(jnp.int32))

    return Verifier(verify)


def test_a_broken_verifier_is_status_1(run, monkeypatch):
    """Catches a self-check that cannot fail, one that ends in a traceback, and praise for the speed of wrong tokens."""
    broken = _keeps_all()
    monkeypatch.setattr(specjax.verify, "rejection", lambda: broken)
    result = run()
    assert result.exit_code == 1, result.output
    assert "Something is broken here" in result.stdout
    assert "that is no near-tie" in " ".join(result.stdout.split())
    assert result.stdout.count("FAILED") == 2
    assert "Speculation" not in result.stdout


@pytest.mark.parametrize(("slope", "is_tied"), [(0.0, True), (1.0, False)])
def test_a_near_tie_is_no_failure(slope, is_tied):
    """Catches an alarm about tokens that rounding chooses between, and one that is explained away as rounding. The
    runs are made up; the scores that judge them are the model's: all alike, or one apart for neighbouring ids."""
    model = testing.table_model(1, 5)
    table = jnp.broadcast_to(slope * jnp.arange(5.0), (6, 5))
    target = SimpleNamespace(model=model, params=table)

    def says(*tokens):
        return lambda limit, prompts: SimpleNamespace(new_tokens=lambda: [list(tokens)])

    prompts = [text.Prompts(np.array([[1, 2]], np.int32), np.array([2], np.int32))]
    runs = Comparison({None: says(3, 4, 1), 3: says(3, 3, 0)}, prompts, Setting(), {}, {})
    check = (Pair(target, target, None), runs, self_check._Clock(lambda what: contextlib.nullcontext()))
    if is_tied:
        assert (
            self_check._same_tokens(*check)
            == "1 tokens of 1 texts, all the same up to 1 near-tie, where rounding decides"
        )
    else:
        with pytest.raises(AssertionError, match=r"after 3 tokens speculation goes on with \[3, 0\] .* differ by 1$"):
            self_check._same_tokens(*check)


def test_a_wrong_distribution_is_found(monkeypatch):
    """Catches a chi-square test too blunt for a rule that is right at temperature 0 and another distribution above."""
    lossy = specjax.verify.typical_lossy()
    monkeypatch.setattr(specjax.verify, "rejection", lambda: lossy)
    with pytest.raises(AssertionError, match=r"chi-square \d+"):
        self_check._same_distribution(self_check._Clock(lambda what: contextlib.nullcontext()))
