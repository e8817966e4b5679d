"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "specjax.cli"]


def _run(*arguments, env=None, **options):
    whole = {**os.environ, **(env or {})}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, env=whole, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compilation cache for the module: the programs are the same."""
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def test_a_pipe_gets_plain_text(cache):
    """Catches colours, spinners or summaries in what a script reads."""
    out = _run("generate", "import numpy", "--max-new-tokens", "12", env=cache)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("import numpy")
    assert "\x1b" not in out.stdout
    assert out.stdout.endswith("\n")
    for word in ("tokens/s", "acceptance", "tokens per round", "measured", "predicted"):
        assert word in out.stderr
    assert "the same tokens" in out.stderr
    assert "WARNING" not in out.stderr


def test_json_says_everything(cache, tmp_path):
    """Catches numbers that a script cannot read, and prompts mixed up in batches."""
    lines = ["import numpy", "def merge_sort(items):\n".strip(), "class Foo:"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n\n")
    arguments = ("--max-new-tokens", "10", "--batch", "2", "--draft-len", "3", "--temperature", "0.8", "--seed", "5")
    out = _run("generate", "--prompt-file", str(tmp_path / "prompts.txt"), *arguments, "--json", env=cache)
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert [row["prompt"] for row in result["results"]] == lines
    for row in result["results"]:
        assert len(row["tokens"]) == len(row["origins"]) <= 10
        assert row["origins"][0] == "prompt_end"
        assert row["status"] in ("length", "stopped")
    assert result["speedup"] > 0
    assert 0 <= result["acceptance_rate"] <= 1
    alone = _run("generate", lines[0], *arguments, "--json", "--no-baseline", env=cache)
    assert json.loads(alone.stdout)["results"][0] == result["results"][0]  # a row depends on its seed, not its batch
    assert json.loads(alone.stdout)["speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "PROMPT or --prompt-file"),
        (["generate", ""], "prompt 0 is empty"),
        (["generate", "x", "--model", "/nowhere"], "--draft"),
        (["generate", "x", "--model", "/nowhere", "--draft", "/nowhere"], "/nowhere"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--top-p", "0", "--temperature", "1"], "top_p"),
        (["generate", "x", "--dtype", "float33"], "float33"),
        (["generate", "x", "--dtype", "int32"], "cannot be int32"),
        (["generate", "--prompt-file", "/nowhere.txt"], "/nowhere.txt"),
        (["generate", "x", "--draft-len", "0"], "draft-len"),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments, message, cache):
    """Catches tracebacks."""
    out = _run(*arguments, env=cache)
    assert out.returncode == 2
    assert message in out.stderr
    assert "Traceback" not in out.stderr


def test_ctrl_c_stops_cleanly(cache):
    """Catches a traceback, or a process that goes on."""
    arguments = [*COMMAND, "generate", "import numpy", "--max-new-tokens", "100000", "--no-baseline"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **cache}
    )
    assert process.stdout is not None
    assert process.stdout.read(20)  # tokens have begun to come
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err
    assert "of at most 6" in err  # what was done until then is counted
    assert "acceptance" in err
    assert out


def test_ctrl_c_while_compiling_leaves_at_once():
    """Catches a crash in XLA's teardown, and a wait until the compiler is done."""
    arguments = [*COMMAND, "generate", "import numpy", "--max-new-tokens", "900", "--no-baseline", "--no-cache"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(7)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_help_is_quiet():
    """Catches the noise of imports."""
    out = _run("--help")
    assert out.returncode == 0
    assert "generate" in out.stdout
    assert out.stderr == ""
    assert _run("--version").stdout.strip() == "0.1.0"


def test_a_machine_without_accelerator_stays_quiet(cache):
    """Catches libtpu's complaints where it is installed and there is no TPU."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_"))} | cache
    command = [*COMMAND, "generate", "import numpy", "--max-new-tokens", "12", "--no-baseline"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert out.returncode == 0, out.stderr
    for noise in ("libtpu", "WARNING", "E0000", "TPU_"):
        assert noise not in out.stderr
