"""The notebooks' first cell installs what their cells import, beside what comes with specjax."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _cells(notebook: Path) -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def _imports(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def _comes_with_specjax() -> set[str]:
    """What specjax needs, and what that needs; none of it by a name other than it is imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {_name(line) for line in project["dependencies"]}
    needed = [line for name in direct for line in importlib.metadata.requires(name) or [] if "extra ==" not in line]
    return direct | {_name(line) for line in needed}


@pytest.mark.parametrize("notebook", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_first_cell_installs_what_is_imported(notebook):
    """Catches a notebook that runs on Colab, where everything is there, and ends in an ImportError elsewhere."""
    first, *others = _cells(notebook)
    installed = {word for word in ("matplotlib", "specjax") if f'"{word}' in first}
    assert "specjax" in installed
    used = set.union(*map(_imports, [first, *others]))
    assert used <= installed | _comes_with_specjax()


def test_the_quickstart_gives_no_number_on_a_busy_machine():
    """Catches a median of turns that contradict each other, where the library says that nothing follows from them."""
    (cell,) = [source for source in _cells(ROOT / "colab" / "quickstart.ipynb") if "perf_counter" in source]
    assert "specjax.stats.speedup_in_turn(" in cell
    assert "median" not in cell
