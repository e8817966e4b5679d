"""What the library says, to whom, and that it says nothing else."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import test_small_parts
import tiny

import specjax
from specjax import models, testing, text
from specjax.cli import display
from specjax.types import Generation, Status

MODEL = testing.table_model(1, 6)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=6)
DRAFTER = specjax.drafters.draft_model(MODEL)
PROMPTS = jnp.array([[1, 2], [3, 4]])


@pytest.fixture
def said(caplog):
    """Messages at level INFO and above, as (level, text)."""
    caplog.set_level(logging.INFO, "specjax")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_the_library_is_silent_until_somebody_listens():
    """Catches warnings that Python prints by itself where a library adds no NullHandler."""
    code = "import logging, specjax; logging.getLogger('specjax.stream').warning('loud')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
    code += "; logging.basicConfig(); logging.getLogger('specjax.stream').warning('heard')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert out.stderr == "WARNING:specjax.stream:heard\n"


def _writes(tree: ast.AST):
    """Lines that print: print, jax.debug.print and its like, sys.stdout, sys.stderr, typer.echo."""
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if name in ("print", "pprint", "sys.stdout", "sys.stderr", "typer.echo") or "debug.print" in name:
            yield node.lineno


def test_nothing_prints():
    """Catches a print left behind. What the user sees of the command line goes through these files."""
    speaks = {"main.py", "display.py", "interrupts.py", "terminal.py"}
    found = {}
    for file in test_small_parts._files():
        lines = list(_writes(ast.parse(file.read_text(encoding="utf-8"))))
        if lines:
            found[file.name] = lines
    assert found.keys() <= speaks, found
    assert list(_writes(ast.parse("print(1)\nx.y\njax.debug.print('{}', z)\nsys.stderr.write(a)"))) == [1, 3, 4]


def test_a_program_is_announced_once(said):
    """Catches silence about a recompilation, a line for every call, and one that does not say what differs."""
    options = {"max_new_tokens": 5, "controller": specjax.controllers.fixed(2)}
    for capacity in (11, 11, 12):
        specjax.generate(MODEL, TABLE, DRAFTER, TABLE, PROMPTS, capacity=capacity, **options)
    facts = "tracing generate: rows=2, prompt_width=2, capacity={}, draft_len=2"
    assert said() == [("INFO", facts.format(11)), ("INFO", facts.format(12))]


def test_a_stream_tells_of_rows_in_trouble(said):
    """Catches a NaN that a caller who looks at tokens alone never hears of, and healthy rows that are complained of."""
    # Token 5 has no distribution: the first row meets it, the second does not.
    table = jnp.full_like(TABLE, -9.0).at[2, 5].set(9.0).at[5].set(jnp.nan).at[4, 4].set(9.0)
    for _ in specjax.stream(MODEL, table, DRAFTER, table, PROMPTS, max_new_tokens=4):
        pass
    programs, (level, message) = said()[:-1], said()[-1]
    assert (level, message) == ("WARNING", f"row 0: {Status.NON_FINITE.describe()}")
    assert [text.split(":")[0] for _, text in programs] == ["tracing prompts", "tracing stream's rounds"]


def test_text_tells_of_rows_in_trouble(said, monkeypatch):
    """Catches strings that hide how their row ended: they carry no status."""
    row = jnp.array([[60, 61, 62]], jnp.int32)
    full = Generation(row, jnp.array([3]), jnp.array([2]), jnp.array([Status.CACHE_FULL]), None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(text, "generate", lambda *args, **options: full)
    tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    text.generate_text(MODEL, TABLE, DRAFTER, TABLE, tokenizer, ["import os"])
    assert said() == [("WARNING", f"row 0: {Status.CACHE_FULL.describe()}")]


def test_loading_and_saving_are_announced(said, tmp_path):
    """Catches a log that does not say which folder, how large, in which dtype."""
    made = models.random(tiny.config("llama"), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(made.params)) / 1e3
    models.save(made, tmp_path / "mine")
    loaded = models.load(tmp_path / "mine", dtype=jnp.bfloat16)
    models.quantize(loaded)
    saved, read, quantised = (message for _, message in said())
    told = f"saved llama, {count:.3g}k parameters, float32, {4e-3 * count:.4g} MB to {tmp_path / 'mine'} in "
    assert saved.startswith(told)
    told = f"loaded llama, {count:.3g}k parameters, bfloat16, {2e-3 * count:.4g} MB from {tmp_path / 'mine'} in "
    assert read.startswith(told)
    assert "bfloat16, int8" in quantised


@pytest.fixture
def restored():
    """The logger as it was."""
    log = logging.getLogger("specjax")
    handlers, level = log.handlers[:], log.level
    yield log
    log.handlers[:], log.level = handlers, level


def test_verbose_shows_the_log_on_standard_error(restored, capsys):
    """Catches a log on standard output, levels mixed up, and lines doubled when a process runs two commands."""
    for verbose, level in ((1, logging.INFO), (2, logging.DEBUG)):
        display.Display(plain=True, silent=True, verbose=verbose)
        for at in (logging.DEBUG, logging.INFO):
            logging.getLogger("specjax.somewhere").log(at, "level %d", at)
        out, err = capsys.readouterr()
        assert out == ""
        assert [at for at in (logging.DEBUG, logging.INFO) if f"level {at}" in err] == (
            [logging.INFO] if level == logging.INFO else [logging.DEBUG, logging.INFO]
        )
        assert err.count(f"level {logging.INFO}") == 1
