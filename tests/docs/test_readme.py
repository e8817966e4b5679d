"""The Python of README and CONTRIBUTING runs as it stands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from unittest.mock import MagicMock

from specjax import testing

ROOT = Path(__file__).parents[2]


def _blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run(capsys):
    """Catches a README that has fallen behind, or grown past what is read; the example asserts what it claims."""
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130
    example, own_module = _blocks("README.md")
    exec(compile(example, "README.md", "exec"), {})
    assert "tokens per target pass" in capsys.readouterr().out
    assert len(example.strip().splitlines()) <= 12
    exec(compile(own_module, "README.md", "exec"), {})
    assert "Runs without a cache" in capsys.readouterr().out


def test_the_kits_calls_can_be_made(monkeypatch):
    """Catches a page whose calls of the kit no longer fit it: they take minutes, and are bound to their signatures."""
    page = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    (kit,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    called = []
    for name in ("check_drafter", "check_model", "check_verifier"):
        signature = inspect.signature(getattr(testing, name))
        monkeypatch.setattr(
            testing, name, lambda *args, _of=signature, **options: called.append(_of.bind(*args, **options))
        )
    names = dict.fromkeys(("drafter", "draft", "target", "specjax"), MagicMock())
    exec(compile(kit, "using.md", "exec"), names)
    assert len(called) == 3


def test_a_drafter_in_one_file():
    """Catches a CONTRIBUTING whose drafter no longer works, or breaks the contract that it goes on to check."""
    names: dict = {}
    for block in _blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
