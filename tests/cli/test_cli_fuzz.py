"""The command line under hostile arguments, files, streams and environments: a message and a status, no traceback.

In this process, where an exception that would be a traceback fails the test; streams also in processes of their own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pwd
import shutil
import subprocess
import sys
import typing

import jax
import pytest
import tiny

from specjax import Status, models, stats, text
from specjax.cli import error_hints, generate, interrupts, main, options
from specjax.cli.doctor import environment
from specjax.cli.load_pair import Pair

LEAST = {
    "generate": ["x", "--no-cache", "--no-baseline", "--max-new-tokens", "4"],
    "bench": ["--no-cache", "--draft-len", "2", "--max-new-tokens", "12", "--context", "8", "--prompts", "1"],
    "compile": ["--model", "target", "--draft", "draft", "--topology", "v5e:1x1"],
    "doctor": ["--no-check", "--no-cache"],
}
NO_INTEGERS = [
    "-9223372036854775809", "9223372036854775808", "1000000000000", "2147483648", "-2147483649", "nan", "inf", "1e400",
    "0x10", "1.5", "", "\u00b2", "ten", "9" * 5000,
]  # fmt: skip
NO_FLOATS = ["nan", "inf", "-inf", "1e400", "1e300", "", "ten", "1,5"]


class Result:
    """What a command left behind."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, " ".join(err.split())


@pytest.fixture
def run(monkeypatch):
    """`specjax ARGUMENTS` here, with streams of its own; exceptions that `main` lets through are raised."""
    monkeypatch.setattr(interrupts, "watch", lambda is_busy: None)
    before = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir", "jax_platforms")}

    def command(*arguments, stdin=b""):
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
        monkeypatch.setattr(sys, "argv", ["specjax", *arguments])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        given = sys.stdin
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main.main()
        if sys.stdin is not given:
            sys.stdin.close()
        said = []
        for stream in (out, err):
            stream.flush()
            said.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
        return Result(left.value.code, *said)

    yield command
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def small_pair():
    config = tiny.config("llama", 4096)
    target, draft = (models.random(config, jax.random.key(seed)) for seed in (0, 1))
    return Pair(target, draft, text.load_tokenizer(models.PRETRAINED / "target"))


@pytest.fixture
def small(monkeypatch, small_pair):
    """Nothing is read from disk."""
    for module in (main, generate):
        monkeypatch.setattr(module, "load_pair", lambda *given: small_pair)


def _refused(result: Result, *words: str) -> None:
    assert result.status == 2, (result.out, result.err)
    assert result.err.count("specjax: ") + result.err.count("Usage: ") == 1, result.err  # one message
    for word in words:
        assert word in result.err


def _options(kind: type) -> list[tuple[str, str]]:
    """(command, option) for every option of that kind: new ones are tested as they come."""
    return [
        (found.name or found.callback.__name__, "--" + name.replace("_", "-"))  # type: ignore[union-attr]
        for found in main.app.registered_commands
        for name, given in typing.get_type_hints(found.callback).items()
        if kind in (given, *typing.get_args(given)) and name != "verbose"
    ]


def test_every_number_is_among_those_below():
    """Catches a fuzz that has become blind."""
    assert len(_options(int)) >= 16
    assert len(_options(float)) >= 6


@pytest.mark.parametrize(("command", "option"), _options(int))
@pytest.mark.usefixtures("small")
def test_no_integer_is_too_strange(run, command, option):
    """Catches OverflowError and TypeError from deep inside, numbers that wrap, and memory asked for by mistake."""
    for value in NO_INTEGERS:
        result = run(command, *LEAST[command], f"{option}={value}")
        _refused(result, option)
        if value == "2147483648":
            assert any(str(most) in result.err for most in (options.INT32, options.TOKENS, options.LONGEST_DRAFT))


@pytest.mark.parametrize(("command", "option"), _options(float))
@pytest.mark.usefixtures("small")
def test_no_float_is_too_strange(run, command, option):
    """Catches numbers that are none, in what would be a distribution."""
    for value in NO_FLOATS:
        result = run(command, *LEAST[command], f"{option}={value}")
        assert option in result.err or option[2:].replace("-", "_") in result.err
        _refused(result)


CONFIG = json.loads((models.PRETRAINED / "target/config.json").read_text())
CONFIGS = {
    "nested": b"[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "a list": b"[]",
    "empty": b"",
    **{
        f"{name}: {value!r}": json.dumps({**CONFIG, name: value}).encode()
        for name, values in {
            "model_type": (["llama"], {}),
            "hidden_size": ("x", -1, 1e400, True),
            "num_attention_heads": (0, [], "3"),
            "num_hidden_layers": (2**70, 1.5),
            "vocab_size": ("x", {}),
            "head_dim": ("x",),
            "intermediate_size": ([],),
            "max_position_embeddings": ("x", []),
            "rms_norm_eps": ("x", -1, 1e400),
            "hidden_act": ([], {}),
            "rope_parameters": (-1, "x", {"rope_type": "linear", "factor": "x"}, {"rope_theta": "x"}),
        }.items()
        for value in values
    },
}
FILES = {
    **{("config.json", name): content for name, content in CONFIGS.items()},
    ("tokenizer.json", "an object"): b"{}",
    ("tokenizer.json", "cut off"): b'{"version": "1.0", "model": {"type"',
    ("tokenizer.json", "unknown"): b'{"version": "1.0", "model": {"type": "X"}}',
    ("model.safetensors", "empty"): b"",
    ("model.safetensors", "random"): bytes(range(256)) * 8,
}


@pytest.mark.parametrize(("file", "what"), FILES)
def test_no_model_folder_is_too_broken(run, tmp_path, file, what):
    """Catches errors of the libraries that read a folder, and arithmetic with what a config.json should not hold."""
    for source in (models.PRETRAINED / "target").iterdir():
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(FILES[file, what])
    folder, good = str(tmp_path), str(models.PRETRAINED / "draft")
    short = ["--draft-len", "9", "--max-new-tokens", "4"]  # bench refuses these: nothing is measured
    _refused(run("generate", *LEAST["generate"], "--model", folder, "--draft", good), file)
    _refused(run("bench", *short, "--model", folder, "--draft", good), file)
    if file == "tokenizer.json":
        _refused(run("generate", *LEAST["generate"], "--tokenizer", folder), file)
    else:
        _refused(run("generate", *LEAST["generate"], "--model", good, "--draft", folder), file)
    if file == "config.json":
        _refused(run("compile", "--model", folder, "--draft", "draft", "--topology", "v5e:1x1"), file)


@pytest.mark.parametrize(
    "option",
    ["generate --model", "generate --draft", "generate --tokenizer", "generate --prompt-file", "generate --trace",
     "bench --model", "bench --draft", "bench --tokenizer", "bench --plot", "compile --model", "compile --draft"],
)  # fmt: skip
def test_no_path_is_too_strange(run, tmp_path, monkeypatch, option):
    """Catches folders for files, names too long for the system, devices, and a name left empty in a script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe" * 99)
    command, name = option.split()
    pair = {"--model": "--draft", "--draft": "--model"}.get(name)
    other = [] if pair is None else [pair, "draft" if command == "compile" else str(models.PRETRAINED / "draft")]
    rest = {
        "generate": [] if name == "--prompt-file" else ["x"],
        "bench": ["--draft-len", "9", "--max-new-tokens", "4"],
        "compile": ["--topology", "v5e:1x1"],
    }[command]
    strange = ["", "-", "x" * 5000, "/dev/null/x", "a/b/c", "/proc/self/mem", "."]
    for value in strange if name in ("--trace", "--plot") else [*strange, "nowhere", "binary", "~nobody/x", " "]:
        _refused(run(command, *rest, *other, name, value), *(["empty"] if value == "" else []))


def test_no_text_is_too_strange(run):
    """Catches bytes that are no UTF-8, which Python hides in half characters that tokenizers choke on."""
    for arguments in (
        ["generate", "caf\udce9"],
        ["generate", "x", "--model", "\udcff"],
        ["bench", "--dtype", "\udc80"],
    ):
        _refused(run(*arguments), "is no UTF-8 text: pass text in UTF-8")
    _refused(run("generate", "caf\udce9"), r"the argument b'caf\xe9'")
    _refused(run("generate", "caf\udcc3\udca9", "--temperature", "-1"), "temperature")  # UTF-8, in an ASCII locale
    _refused(run("generate", "-", stdin=b"caf\xe9"), "standard input is no UTF-8 text")
    _refused(run("generate", "-", "--no-cache", stdin=None), "prompt 0 is empty")  # it was closed
    for arguments in (["compile", *LEAST["compile"], "--mesh", "model=\u00b2"], ["generate", "x", "--dtype", "\x00"]):
        _refused(run(*arguments))


def _nobody(monkeypatch):
    """A container's numeric user: no HOME, no entry in passwd."""

    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("small")
def test_no_home_is_needed(run, monkeypatch):
    """Catches RuntimeError where no home directory can be found: programs are not kept, and doctor says so."""
    _nobody(monkeypatch)
    jax.config.update("jax_compilation_cache_dir", None)
    assert environment.usable_cache_folder() is None
    _refused(run("generate", "x", "--temperature", "-1"), "sampling.temperature")
    _refused(run("generate", "x", "--controller", "throughput", "--temperature", "-1"), "sampling.temperature")
    _refused(run("bench", "--draft-len", "9", "--max-new-tokens", "4"), "max_new_tokens")
    assert jax.config.values["jax_compilation_cache_dir"] is None
    result = run("doctor", "--no-check", "--json")
    said = json.loads(result.out)
    assert (result.status, said["programs"]["folder"], said["programs"]["is_writable"]) == (0, None, False)
    assert "there is no home directory" in " ".join(problem["what"] for problem in said["problems"])
    assert "no home directory" in run("doctor", "--no-check").out
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    _refused(run("--install-completion", "bash"), "there is no home directory here: set HOME")


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere", "x" * 300, "\udcff", "relative"])
@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
@pytest.mark.usefixtures("small")
def test_no_home_is_too_strange(run, monkeypatch, tmp_path, variable, home):
    """Catches a folder for compiled programs that cannot be made, or that JAX cannot take."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, home)
    jax.config.update("jax_compilation_cache_dir", None)
    _refused(run("generate", "x", "--temperature", "-1"), "sampling.temperature")
    assert (jax.config.values["jax_compilation_cache_dir"] is None) is (home != "relative")
    result = run("doctor", "--no-check", "--json")
    assert result.status == 0
    assert json.loads(result.out)["programs"]["is_writable"] or home != "relative"


def test_a_home_that_may_not_be_read_is_told(run, monkeypatch, tmp_path):
    """Catches PermissionError in doctor, which is what one asks why nothing is kept."""
    stat, scandir = os.stat, os.scandir

    def closed(function):
        def guarded(path=".", *args, **options):
            if str(path).startswith(f"{tmp_path}/"):  # root may read whatever its mode is, so a mode would not do
                raise PermissionError(13, "Permission denied", path)
            return function(path, *args, **options)

        return guarded

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "stat", closed(stat))
    monkeypatch.setattr(os, "scandir", closed(scandir))
    result = run("doctor", "--no-check", "--json")
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("Unable to allocate 64.0 GiB"), "this machine is out of memory (Unable to allocate 64.0 GiB)."),
        (RuntimeError("INTERNAL: Out of memory allocating 99 bytes."), "the device is out of memory (INTERNAL: Out of"),
        (RuntimeError("RESOURCE_EXHAUSTED: 99 bytes"), "the device is out of memory (RESOURCE_EXHAUSTED: 99 bytes)"),
        (RuntimeError("Could not determine home directory."), "there is no home directory here: set HOME"),
    ],
)
def test_what_the_machine_lacks_is_a_sentence(error, says):
    """Catches the CPU's words for full memory, and NumPy's, in a traceback."""
    assert (error_hints.explain(error) or "").startswith(says)


def test_what_the_system_refuses_is_a_sentence(tmp_path):
    """Catches error numbers and quotation marks where a name and a reason would do."""
    assert error_hints.of_system(PermissionError(13, "Permission denied", "/a/b")) == "/a/b: Permission denied."
    said = error_hints.of_encoding(UnicodeEncodeError("ascii", "caf\xe9", 3, 4, "ordinal not in range"))
    assert said.startswith(r"'caf\xe9' cannot be the name of a file here: this locale knows ascii only.")
    assert error_hints.of_system(FileNotFoundError("our own sentence.")) == "our own sentence."


@pytest.mark.parametrize(("statuses", "wanted"), [((4, 4), 1), ((4, 1), 0), ((2,), 0)])
def test_a_run_in_which_nothing_came_to_its_end_is_a_failure(run, monkeypatch, statuses, wanted):
    """Catches status 0 after a model whose logits are NaN, which a script would take for a text."""
    rows = [generate.Row("x", "", [], [], Status(value)) for value in statuses]
    given = (rows, stats.zeros(1, 5), 5, "fixed", 1.0, None, None, 0, None, 0.1, None, None, "cpu", False)
    monkeypatch.setattr(generate, "run", lambda *task: generate.Summary(*given))
    assert run("generate", "x", "--no-cache").status == wanted


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_streams_that_take_nothing_are_a_sentence():
    """Catches the interpreter's complaints at its end, and a crash where standard error is closed as well."""
    shell = shutil.which("sh") or "sh"
    command = f'"{sys.executable}" -m specjax.cli'
    for line, status, said in (
        (f"{command} --version > /dev/full", 2, "specjax: standard output, or a file that was asked for, cannot be"),
        (f"{command} --version 1>&-", 2, "specjax: standard output, or a file that was asked for, cannot be written"),
        (f"PYTHONIOENCODING=ascii {command} generate x --temperature -1 1>&- 2>&- <&-", 2, ""),
    ):
        found = subprocess.run([shell, "-c", line], capture_output=True, text=True, timeout=100)
        assert found.returncode == status
        assert found.stderr.startswith(said)
        assert found.stderr.count("\n") == (1 if said else 0)


def test_an_encoding_without_the_character_is_no_error(run, monkeypatch):
    """Catches UnicodeEncodeError in the middle of a text, where a terminal knows ASCII only."""
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(main, "app", lambda prog_name: sys.stdout.write("na\u00efve\n"))
    monkeypatch.setattr(sys, "argv", ["specjax"])
    with contextlib.redirect_stdout(out):
        main.main()
    out.flush()
    assert out.buffer.getvalue() == b"na\\xefve\n"  # type: ignore[attr-defined]
