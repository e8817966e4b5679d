"""The documentation: links resolve, code runs as it stands, the reference is complete, figures are their scripts'."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import jax
import pytest
from links import anchors, broken, targets

import specjax

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / "benchmarks" / name for name in ("RESULTS.md", "results/README.md")),
]
# Public modules without an __all__, besides those that specjax names itself: all that they define is in the reference.
MODULES = ("aot.shapes", "noise", "profiling.machine", "profiling.roofline", "sharding", "text")
_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_resolve(page):
    """Catches a renamed page or heading that others still point to, and an address that was pasted in halves."""
    assert broken(page, ROOT) == []


def test_broken_links_are_seen(tmp_path):
    """Catches a checker that passes whatever it is given."""
    page = tmp_path / "page.md"
    page.write_text(
        "# Über a `thing`: 2\n# Twice\n# Twice\n[a](#no) [b](gone.md) [c](http:/x.org) [d][e]\n\n[e]: ../up.md\n"
    )
    assert len(broken(page, tmp_path)) == 4
    assert anchors(page.read_text()) == {"über-a-thing-2", "twice", "twice-1"}
    text = "![p](a.svg) [`f(x)`](b.md#c) <https://d.org> `[no](e)` [g](<h.md>)\n```text\n[no](i)\n```\n[j](k_(l).md)\n"
    assert targets(text) == ["a.svg", "b.md#c", "h.md", "k_(l).md", "https://d.org"]


@pytest.mark.parametrize(
    "page", [page for page in sorted(DOCS.rglob("*.md")) if _BLOCK.search(page.read_text(encoding="utf-8"))], ids=_name
)
def test_python_runs_as_it_stands(page, monkeypatch, tmp_path):
    """Catches a page whose code has fallen behind, or claims what is not so. Blocks run in order, in one namespace;
    what is not meant to run is fenced as something else than python."""
    monkeypatch.chdir(tmp_path)  # what a page writes is not left behind
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    text = page.read_text(encoding="utf-8")
    names: dict = {"__name__": "__main__"}
    for block in _BLOCK.finditer(text):
        above = text[: block.start(2)].count("\n")  # so that a traceback names the page's own line
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as readers have it
            exec(compile("\n" * above + textwrap.dedent(block[2]), str(page), "exec"), names)


def test_a_drafter_has_40_lines():
    """Catches a page that has outgrown its title."""
    whole = _BLOCK.findall((DOCS / "write-a-drafter.md").read_text(encoding="utf-8"))[0][1]
    assert len(whole.strip().splitlines()) <= 40


def _public() -> dict[str, object]:
    """Every public object by its public name; modules among them are covered by what is in them."""
    inner = [module.name for module in pkgutil.walk_packages(specjax.__path__, "specjax.") if module.ispkg]
    packages = [package for name in ["specjax", *inner] if hasattr(package := importlib.import_module(name), "__all__")]
    found = {f"{package.__name__}.{name}": getattr(package, name) for package in packages for name in package.__all__}
    named = [value for value in found.values() if isinstance(value, ModuleType) and not hasattr(value, "__all__")]
    for module in [*named, *(importlib.import_module(f"specjax.{name}") for name in MODULES)]:
        for own, value in vars(module).items():
            if not own.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value):
                found[f"{module.__name__}.{own}"] = value
    return found


def _resolved(path: str) -> object:
    """What a directive documents: a module wherever one has that name, since that is what griffe finds first."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for name in parts[count:]:
            value = getattr(value, name)
        return value
    raise AssertionError(f"::: {path} names nothing")


def test_the_reference_is_complete():
    """Catches a public name that the reference forgot, and an entry that shows a module in place of its function."""
    paths = [path for page in sorted(DOCS.rglob("*.md")) for path in _DIRECTIVE.findall(page.read_text("utf-8"))]
    assert len(paths) == len(set(paths))
    shown = [(path, _resolved(path)) for path in paths]
    last = {path.split(".")[-1] for path in paths}
    documented = {id(value) for _, value in shown}
    for name, value in _public().items():
        if not isinstance(value, ModuleType):
            assert id(value) in documented, f"{name} is in no page of docs/api"
            assert name.split(".")[-1] in last, name
    for path, value in shown:
        assert not isinstance(value, ModuleType), f"::: {path} shows a module: name what is in it"
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, path


def test_figures_are_those_of_their_scripts(tmp_path):
    """Catches a figure that was not drawn again after its script, its style or its numbers had changed."""
    matplotlib = pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib")
    scripts = sorted(set(DOCS.glob("figures/*.py")) - {DOCS / "figures/style.py", DOCS / "figures/measure.py"})
    code = "\n".join(f"import {path.stem}; {path.stem}.main()" for path in scripts)
    environment = {
        "PYTHONPATH": f"{DOCS / 'figures'}:{ROOT}",
        "JAX_PLATFORMS": "cpu",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert set(drawn) == {path.name for path in DOCS.glob("figures/*.svg")}
    assert len(drawn) == len(scripts)
    for name, svg in drawn.items():
        committed = (DOCS / "figures" / name).read_text(encoding="utf-8")
        words = [re.findall(r"<text[^>]*>([^<]*)</text>", each) for each in (svg, committed)]
        assert words[0] == words[1], name
        if matplotlib.__version__ == _version():
            assert svg == committed, name


def _version() -> str:
    return json.loads((DOCS / "figures/measured.json").read_text(encoding="utf-8"))["matplotlib"]


def test_pages_quote_what_was_measured():
    """Catches a table that was not updated when docs/figures/measure.py ran again."""
    measured = json.loads((DOCS / "figures/measured.json").read_text(encoding="utf-8"))
    by_temperature = measured["by_temperature"].values()
    row = " | ".join(f"{counts['tokens_per_round']:.2f}" for counts in by_temperature)
    assert f"| tokens a round | {row} |" in (DOCS / "when-not-to-use-it.md").read_text(encoding="utf-8")
    page = (DOCS / "write-a-drafter.md").read_text(encoding="utf-8")
    for name in ("ngram", "draft_model"):
        cells = " | ".join(f"{tokens:.2f}" for tokens in measured["drafters"][name].values())
        assert re.search(rf"^\| `{name}\b.* {re.escape(f'| {cells} |')}$", page, re.MULTILINE), name
