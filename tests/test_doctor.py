"""`specjax doctor`: what it says of environments that are not at hand, and a self-check that can fail."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console
from typer.testing import CliRunner

import specjax
from specjax import cli, complaints, contest, doctor, doctor_report, environment, models, self_check, testing, text
from specjax.contest import Contest, Setting
from specjax.doctor import Severity
from specjax.environment import Device, Devices, Package
from specjax.pair import Pair
from specjax.self_check import Pace, SelfCheck
from specjax.types import Verdict, Verifier

HEALTHY = environment.Environment(
    version="0.1.0",
    folder="/somewhere/specjax",
    packages=[
        Package("jax", "0.10.2", "0.8.2"),
        Package("jaxlib", "0.10.2", None),
        Package("flax", "0.12.10", "0.12.1"),
    ],
    host=environment.Host("Linux 6.1 x86_64", "3.12.1", "A processor", 8, 32 * 2**30),
    hardware={},
    devices=Devices("cpu", [Device("cpu", "cpu", 1, None)], None, {}),
    settings=dict.fromkeys(environment.settings()),
    programs=environment.Programs("/home/me/.cache/specjax/xla", 3, 5 * 2**20, True),
)
GPU, TPU = {"cuda": "/dev/nvidia0"}, {"tpu": "/dev/accel0"}
BUSY = "ABORTED: The TPU is already in use by process with pid 176028."
CPU_ASKED = {**HEALTHY.settings, "JAX_PLATFORMS": "cpu"}


def _with(*packages):
    return [*HEALTHY.packages, *(Package(name, version, None) for name, version in packages)]


def _refusing(**refused):
    return HEALTHY.devices._replace(refused=refused)


PROBLEMS = {
    "nothing": ({}, []),
    "a GPU and no plugin": ({"hardware": GPU}, [("warning", "NVIDIA GPU", "specjax[cuda12]")]),
    "a TPU and no libtpu": ({"hardware": TPU}, [("warning", "a TPU", "specjax[tpu]")]),
    "an AMD GPU": ({"hardware": {"rocm": "/dev/kfd"}}, [("warning", "AMD", "no extra for AMD")]),
    "a GPU kept idle": (
        {"hardware": GPU, "packages": _with(("jax-cuda13-plugin", "0.10.2")), "settings": CPU_ASKED},
        [("warning", "runs on the CPU", "JAX_PLATFORMS=cpu keeps JAX off it: unset it")],
    ),
    "a GPU whose plugin fails": (
        {
            "hardware": GPU,
            "packages": _with(("jax-cuda12-plugin", "0.10.2")),
            "devices": _refusing(cuda="no CUDA driver"),
        },
        [("warning", "no CUDA driver", "Does the driver fit?")],
    ),
    "a TPU that another process holds": (
        {"hardware": TPU, "packages": _with(("libtpu", "0.0.52")), "devices": _refusing(tpu=BUSY)},
        [("warning", "pid 176028", "only one can")],
    ),
    "libtpu and no TPU": ({"packages": _with(("libtpu", "0.0.52"))}, [("note", "no TPU", "JAX_PLATFORMS=cpu")]),
    "libtpu and no TPU, looked after": ({"packages": _with(("libtpu", "0.0.52")), "settings": CPU_ASKED}, []),
    "no devices": (
        {"devices": Devices(None, [], "Unable to initialize backend 'rocm'", {})},
        [("error", "Unable to initialize", "JAX's own account")],
    ),
    "no devices, one busy": (
        {"devices": Devices(None, [], BUSY, {})},
        [("error", "pid 176028", "only one can")],
    ),
    "no home": (
        {"programs": environment.Programs(None, 0, 0, False)},
        [("warning", "no home directory", "XDG_CACHE_HOME, or HOME")],
    ),
    "x64": (
        {"settings": {**HEALTHY.settings, "jax_enable_x64": "True"}},
        [("error", "jax_enable_x64", "jax.enable_x64(False)")],
    ),
    "no jit": (
        {"settings": {**HEALTHY.settings, "jax_disable_jit": "True"}},
        [("warning", "jit is off", "JAX_DISABLE_JIT")],
    ),
    "old": (
        {"packages": [Package("jax", "0.8.1", "0.8.2"), Package("numpy", "2.0.0", "2.0")]},
        [("warning", "jax 0.8.1 is older", "'jax>=0.8.2'")],
    ),
    "not installed": (
        {"packages": [Package("tokenizers", None, "0.21")]},
        [("warning", "tokenizers is not installed", "specjax[cli]")],
    ),
    "plugin of another jaxlib": (
        {"packages": _with(("jax-cuda12-plugin", "0.9.0"))},
        [("warning", "not of jaxlib 0.10.2", "jax[cuda12]")],
    ),
    "several devices": (
        {"devices": Devices("tpu", [Device("TPU v6 lite", "tpu", 8, 2**35)], None, {}), "hardware": TPU},
        [("note", "8 devices", "specjax.sharding")],
    ),
    "kernels off": (
        {
            "devices": Devices("tpu", [Device("TPU v6 lite", "tpu", 1, 2**35)], None, {}),
            "settings": {**HEALTHY.settings, "SPECJAX_TPU_KERNELS": "0"},
        },
        [("note", "SPECJAX_TPU_KERNELS=0", "unset it")],
    ),
    "a cache that is closed": (
        {"programs": HEALTHY.programs._replace(is_writable=False)},
        [("warning", "cannot be written", "XDG_CACHE_HOME")],
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_come_with_their_cure(case):
    """Catches a problem that is missed, imagined, or comes with another one's cure."""
    changes, wanted = PROBLEMS[case]
    found = doctor.problems(HEALTHY._replace(**changes))
    assert [problem.severity.value for problem in found] == [severity for severity, _, _ in wanted]
    for problem, (_, what, cure) in zip(found, wanted, strict=True):
        assert what in problem.what
        assert cure in problem.cure


def test_the_worst_comes_first():
    """Catches an error below a screen of notes, and a report that is healthy all the same."""
    sick = HEALTHY._replace(
        packages=_with(("libtpu", "0.0.52")), hardware=GPU, settings={**HEALTHY.settings, "jax_enable_x64": "True"}
    )
    found = doctor.problems(sick)
    assert [problem.severity for problem in found] == [Severity.error, Severity.warning, Severity.note]
    assert not doctor.Report(sick, found, None).is_healthy
    assert doctor.Report(sick, found[1:], None).is_healthy  # slow, not broken


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "cuda12"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "cuda13"),
        (None, "cuda12"),
    ],
)
def test_the_driver_chooses_the_extra(line, extra, tmp_path):
    """Catches CUDA 13 on a driver that cannot run it."""
    file = tmp_path / "version"
    if line is not None:
        file.write_text(line + "\nGCC version:  gcc version 12.2.0\n")
    assert doctor._cuda_extra(file) == extra


PACE = Pace(
    draft_len=3, step_seconds=1e-3, round_seconds=2e-3, round_cost=2.0, pass_cost=1.5, tokens_per_round=3.0,
    acceptance=0.7, speedups=[1.4, 1.5, 1.6], dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {},
            "Speculation pays here: 1.50 times plain decoding at K = 3. A round brings 3.0 tokens and costs 2.0 steps.",
        ),
        (
            {"round_cost": 3.5, "pass_cost": 3.0},
            "Speculation does not pay here: 0.86 times plain decoding at K = 3, because a pass over 4 tokens costs "
            "3.0 passes over one.",
        ),
        (
            {"round_cost": 4.0, "pass_cost": 1.2},
            "Speculation does not pay here: 0.75 times plain decoding at K = 3, because drafting and judging make a "
            "round 3.3 times as long as its pass over 4 tokens.",
        ),
        (
            {"tokens_per_round": 1.1},
            "Speculation does not pay here: 0.55 times plain decoding at K = 3, because a round brings 1.1 tokens of "
            "at most 4.",
        ),
        (
            {"round_cost": 3.0, "pass_cost": 2.5},
            "Speculation makes no difference here: 1.00 times plain decoding at K = 3, because a pass over 4 tokens "
            "costs 2.5 passes over one.",
        ),
    ],
)  # fmt: skip
def test_the_verdict_is_plain(changes, says):
    """Catches a verdict the wrong way round, and one that blames what is not to blame."""
    pace = PACE._replace(**changes)
    assert self_check.verdict(pace) == says
    assert pace.pays == says.startswith("Speculation pays")


def test_a_busy_machine_gets_no_verdict():
    """Catches "pays here: 2.61 times" from repetitions between 1.71 and 6.34, on the terminal and in JSON."""
    pace = PACE._replace(speedups=[1.71, 2.0, 2.61, 4.9, 6.34])
    said = "This machine is busy: no verdict. Speed-ups of 1.71 to 6.34 in 5 turns at K = 3 say nothing."
    assert self_check.verdict(pace) == said
    check = SelfCheck([], pace, [], 1.0, 1.0)
    report = doctor_report.as_json(doctor.Report(HEALTHY, [], check))["check"]["speed"]
    assert (report["busy"], report["pays"], report["verdict"]) == (True, None, said)
    assert said in _shown(doctor_report.result(check))
    assert PACE.pays is True


def test_a_slow_machine_is_told_what_was_left_out(small_pair):
    """Catches minutes of a doctor where the machine is slow, and a speed that is silently missing."""
    setting = Setting((3,), prompts=2, context=16, max_new_tokens=32, repeats=3)
    found = self_check.run(small_pair, lambda what: contextlib.nullcontext(), setting, budget=0.0)
    assert [finding.check for finding in found.findings] == ["greedy speculation against plain decoding, float32"]
    assert "of 1 texts" in found.findings[0].detail  # the others had no time
    assert found.left_out == ["sampled speculation against its exact law", "time of steps and rounds"]
    assert (found.passed, found.pace) == (True, None)
    assert f"No time was left for: {'; '.join(found.left_out)}." in _shown(doctor_report.result(found))
    assert doctor_report.as_json(doctor.Report(HEALTHY, [], found))["check"]["left_out"] == found.left_out


def test_turns_end_with_the_time(monkeypatch):
    """Catches repetitions that go on past the time of the whole check."""
    timed = []
    monkeypatch.setattr(contest, "time_generations", lambda *given: timed.append(given))
    whole: Any = Contest({contest.PLAIN: None, 3: None}, [], Setting(repeats=5), {}, {})  # type: ignore[dict-item]
    found = contest.time_all(whole, lambda what: contextlib.nullcontext(), enough=lambda turns: turns == 2)
    assert [len(turns) for turns in found.values()] == [2, 2]


def _shown(parts) -> str:
    console = Console(file=io.StringIO(), width=100)
    for part in parts:
        console.print(part)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_report_says_everything():
    """Catches a fact that is collected and not shown, and brackets that rich takes for markup."""
    sick = HEALTHY._replace(
        devices=Devices("gpu", [Device("NVIDIA H100 80GB HBM3", "gpu", 2, 60 * 2**30)], None, {}),
        settings={**HEALTHY.settings, "XLA_FLAGS": "--xla_dump_to=[here]"},
        packages=_with(("jax-cuda12-plugin", "0.9.0")),
    )
    said = _shown([doctor_report.facts(sick), *doctor_report.problems(doctor.problems(sick))])
    for words in (
        "0.1.0 from /somewhere/specjax", "python 3.12.1, jax 0.10.2", "A processor, 8 cores, 32.0 GiB",
        "2 x NVIDIA H100 80GB HBM3, 60.0 GiB for JAX, 3350 GB/s, 989 TFLOP/s in bfloat16 (data sheet)", "gpu: models",
        "not TF32", "XLA_FLAGS=--xla_dump_to=[here]", "not set: JAX_PLATFORMS", "3 compiled programs, 5.0 MiB",
        "jax[cuda12]",
    ):  # fmt: skip
        assert words in said


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
    monkeypatch.setattr(cli, "load_pair", lambda *args: small_pair)
    monkeypatch.setattr(self_check, "run", lambda pair, busy: whole(pair, busy, setting))

    def command(*arguments):
        return CliRunner().invoke(cli.app, ["doctor", "--no-cache", *arguments])

    return command


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
    runs = Contest({None: says(3, 4, 1), 3: says(3, 3, 0)}, prompts, Setting(), {}, {})
    check = (Pair(target, target, None), runs, self_check._Clock(lambda what: contextlib.nullcontext()))
    if is_tied:
        assert (
            self_check._same_tokens(*check)
            == "1 tokens of 1 texts, all the same up to 1 near-tie, where rounding decides"
        )
    else:
        with pytest.raises(AssertionError, match=r"after 3 tokens speculation goes on with \[3, 0\] .* differ by 1$"):
            self_check._same_tokens(*check)


def test_a_wrong_law_is_found(monkeypatch):
    """Catches a chi-square test too blunt for a rule that is right at temperature 0 and another law above."""
    lossy = specjax.verify.typical_lossy()
    monkeypatch.setattr(specjax.verify, "rejection", lambda: lossy)
    with pytest.raises(AssertionError, match=r"chi-square \d+"):
        self_check._same_law(self_check._Clock(lambda what: contextlib.nullcontext()))


def test_no_check_is_quick(monkeypatch):
    """Catches models loaded, or programs compiled, where only facts were asked for."""
    monkeypatch.setattr(cli, "load_pair", None)
    result = CliRunner().invoke(cli.app, ["doctor", "--no-check"])
    assert result.exit_code == 0, result.output
    assert "packages" in result.stdout
    assert "self-check" not in result.stdout


def test_errors_leave_the_self_check_out(monkeypatch):
    """Catches a self-check on a machine where nothing can run, and status 0 there."""
    monkeypatch.setattr(environment, "look", lambda: HEALTHY._replace(devices=Devices(None, [], "no driver", {})))
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "no driver" in result.stdout
    assert "first the errors above" in result.stdout
    as_json = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert as_json.exit_code == 1
    assert (json.loads(as_json.stdout)["healthy"], json.loads(as_json.stdout)["check"]) == (False, None)


def test_a_bug_is_not_explained_away():
    """Catches an error of our own that is shown as one line about devices, without its traceback."""
    assert complaints.explain(RuntimeError("a bug")) is None
