"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specjax import models

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
    for word in ("tokens/s", "acceptance", "tokens per round", "predicted"):
        assert word in out.stderr
    assert " run" in out.stderr or "no verdict" in out.stderr  # of a busy machine
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
    assert 1 <= result["runs"] <= 5
    assert 0 <= result["acceptance_rate"] <= 1
    assert out.stderr == ""
    alone = _run("generate", lines[0], *arguments, "--json", "--no-baseline", "-v", env=cache)
    assert json.loads(alone.stdout)["results"][0] == result["results"][0]  # a row depends on its seed, not its batch
    assert "loaded llama, 14.2M parameters" in alone.stderr  # the log keeps to standard error
    assert "tracing stream's rounds: rows=1" in " ".join(alone.stderr.split())
    assert json.loads(alone.stdout)["speedup"] is None


def test_a_text_ends_before_a_stop_string(cache, tmp_path):
    """Catches an option that the shown text, JSON, the page or the comparison with plain decoding does not know."""
    arguments = ("generate", "import numpy", "--max-new-tokens", "12", "--json")
    plain = json.loads(_run(*arguments, "--no-baseline", env=cache).stdout)["results"][0]
    stop = plain["text"][3:5]
    escaped = stop.replace("\n", "\\n").replace("\t", "\\t")
    page = tmp_path / "page.html"
    out = _run(*arguments, "--stop", "no such thing", "--stop", escaped, "--trace", str(page), env=cache)
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    (row,) = result["results"]
    assert (row["text"], row["status"]) == (plain["text"].split(stop)[0], "stopped")
    assert row["tokens"] == plain["tokens"][: len(row["tokens"])]
    assert len(row["origins"]) == len(row["tokens"]) < 12
    assert result["same_tokens_as_plain"] is True
    assert '"status": "stopped"' in page.read_text().replace('"status":"', '"status": "')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "PROMPT or --prompt-file"),
        (["generate", ""], "prompt 0 is empty"),
        (["generate", "x", "--model", "/proc/nowhere"], "/proc/nowhere is neither"),
        (["generate", "x", "--draft", "/proc/nowhere"], "--draft needs --model"),
        (["bench", "--model", "/proc/nowhere"], "--model needs --draft"),
        (["generate", "x", "--model", "/proc/nowhere", "--draft", "/proc/nowhere"], "/proc/nowhere"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--top-p", "0", "--temperature", "1"], "top_p"),
        (["generate", "x", "--dtype", "float33"], "float33"),
        (["generate", "x", "--dtype", "int32"], "cannot be int32"),
        (["generate", "--prompt-file", "/proc/nowhere.txt"], "/proc/nowhere.txt"),
        (["generate", "x", "--draft-len", "0"], "draft-len"),
        (["generate", "x", "--stop", ""], "empty string"),
        (["bench", "--verify", "everything"], "exactness"),
        (["doctor", "--jsn"], "--json"),
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


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("specjax gen", ["generate"]),
        ("specjax ", ["generate", "bench", "compile", "doctor"]),
        ("specjax generate --verifier ", ["rejection", "block", "coupled", "greedy", "typical-lossy", "top-k-lossy"]),
        ("specjax generate --draft-l", ["--draft-len"]),
        ("specjax bench --int8 ta", ["target"]),
    ],
)
def test_completion(words, wanted):
    """Catches commands, options or values that <Tab> does not offer, and noise between them."""
    place = words.count(" ")
    env = {"_SPECJAX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    out = _run(env=env)
    assert (out.stdout.split(), out.stderr) == (wanted, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(shell, tmp_path):
    """Catches a script that completes a command of another name."""
    env = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = _run("--show-completion", shell, env=env)
    assert shown.returncode == 0, shown.stderr
    assert "_SPECJAX_COMPLETE=complete_" in shown.stdout
    out = _run("--install-completion", shell, env=env)
    assert out.returncode == 0, out.stderr
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_SPECJAX_COMPLETE=complete_" in text for text in written)


def test_a_reader_that_leaves_is_no_error(cache):
    """Catches a traceback from `specjax generate ... | head -c 1`."""
    arguments = [*COMMAND, "generate", "import numpy", "--max-new-tokens", "12", "--no-baseline"]
    pipe, env = subprocess.PIPE, {**os.environ, **cache}
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "")


def test_no_device_is_one_message(cache):
    """Catches JAX's traceback where it is asked for what is not here, and a doctor that dies of the disease."""
    env = {**cache, "JAX_PLATFORMS": "nothing"}
    out = _run("generate", "x", env=env)
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.startswith("specjax: JAX has no device to run on (")
    assert "`specjax doctor`" in out.stderr
    doctor = _run("doctor", "--json", env=env)
    assert doctor.returncode == 1
    assert json.loads(doctor.stdout)["problems"][0]["severity"] == "error"


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


def test_a_profile_is_measured_once(cache):
    """Catches an adaptive run without its costs, and a profile that is measured anew for a prompt of another length."""
    small = str(models.PRETRAINED / "draft")  # as its own draft: seconds instead of a minute
    arguments = ("--controller", "throughput", "--draft-len", "1", "--max-new-tokens", "6", "--no-baseline", "--json")
    arguments += ("--model", small, "--draft", small)
    for prompt in ("import numpy", "def merge_sort(items: list[int]) -> list[int]:"):
        out = _run("generate", prompt, *arguments, "-v", env=cache)
        assert out.returncode == 0, out.stderr
        result = json.loads(out.stdout)
        assert len(result["round_costs"]) == len(result["draft_lengths"]) == 2
        assert min(result["round_costs"]) > 0
        assert result["profiled_speedup"] > 0
    assert "profile of" in out.stderr
    assert len(list((Path(cache["XDG_CACHE_HOME"]) / "specjax/profiles").glob("*.json"))) == 1
