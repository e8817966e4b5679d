"""`specjax doctor`: what it says of environments that are not at hand, and a self-check that can fail."""

from __future__ import annotations

import json

import pytest
from healthy import HEALTHY, PACE, shown
from typer.testing import CliRunner

from specjax.cli import error_hints, main
from specjax.cli.doctor import display as doctor_display
from specjax.cli.doctor import environment, problems, self_check
from specjax.cli.doctor.environment import Device, Devices, Package
from specjax.cli.doctor.problems import Severity
from specjax.cli.doctor.self_check import SelfCheck

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
    found = problems.problems(HEALTHY._replace(**changes))
    assert [problem.severity.value for problem in found] == [severity for severity, _, _ in wanted]
    for problem, (_, what, cure) in zip(found, wanted, strict=True):
        assert what in problem.what
        assert cure in problem.cure


def test_the_worst_comes_first():
    """Catches an error below a screen of notes, and a report that is healthy all the same."""
    sick = HEALTHY._replace(
        packages=_with(("libtpu", "0.0.52")), hardware=GPU, settings={**HEALTHY.settings, "jax_enable_x64": "True"}
    )
    found = problems.problems(sick)
    assert [problem.severity for problem in found] == [Severity.error, Severity.warning, Severity.note]
    assert not problems.Report(sick, found, None).is_healthy
    assert problems.Report(sick, found[1:], None).is_healthy  # slow, not broken


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
    assert problems._cuda_extra(file) == extra


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
    report = doctor_display.as_json(problems.Report(HEALTHY, [], check))["check"]["speed"]
    assert (report["busy"], report["pays"], report["verdict"]) == (True, None, said)
    assert said in shown(doctor_display.result(check))
    assert PACE.pays is True


def test_the_report_says_everything():
    """Catches a fact that is collected and not shown, and brackets that rich takes for markup."""
    sick = HEALTHY._replace(
        devices=Devices("gpu", [Device("NVIDIA H100 80GB HBM3", "gpu", 2, 60 * 2**30)], None, {}),
        settings={**HEALTHY.settings, "XLA_FLAGS": "--xla_dump_to=[here]"},
        packages=_with(("jax-cuda12-plugin", "0.9.0")),
    )
    said = shown([doctor_display.facts(sick), *doctor_display.problems(problems.problems(sick))])
    for words in (
        "0.1.0 from /somewhere/specjax", "python 3.12.1, jax 0.10.2", "A processor, 8 cores, 32.0 GiB",
        "2 x NVIDIA H100 80GB HBM3, 60.0 GiB for JAX, 3350 GB/s, 989 TFLOP/s in bfloat16 (data sheet)", "gpu: models",
        "not TF32", "XLA_FLAGS=--xla_dump_to=[here]", "not set: JAX_PLATFORMS", "3 compiled programs, 5.0 MiB",
        "jax[cuda12]",
    ):  # fmt: skip
        assert words in said


def test_no_check_is_quick(monkeypatch):
    """Catches models loaded, or programs compiled, where only facts were asked for."""
    monkeypatch.setattr(main, "load_pair", None)
    result = CliRunner().invoke(main.app, ["doctor", "--no-check"])
    assert result.exit_code == 0, result.output
    assert "packages" in result.stdout
    assert "self-check" not in result.stdout


def test_errors_leave_the_self_check_out(monkeypatch):
    """Catches a self-check on a machine where nothing can run, and status 0 there."""
    monkeypatch.setattr(environment, "look", lambda: HEALTHY._replace(devices=Devices(None, [], "no driver", {})))
    result = CliRunner().invoke(main.app, ["doctor"])
    assert result.exit_code == 1
    assert "no driver" in result.stdout
    assert "first the errors above" in result.stdout
    as_json = CliRunner().invoke(main.app, ["doctor", "--json"])
    assert as_json.exit_code == 1
    assert (json.loads(as_json.stdout)["healthy"], json.loads(as_json.stdout)["check"]) == (False, None)


def test_a_bug_is_not_explained_away():
    """Catches an error of our own that is shown as one line about devices, without its traceback."""
    assert error_hints.explain(RuntimeError("a bug")) is None
