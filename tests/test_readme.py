"""The Python of README and CONTRIBUTING runs as it stands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from specjax import testing

ROOT = Path(__file__).parent.parent


def _blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_runs(capsys, monkeypatch):
    """Catches a README that has fallen behind; the example asserts what it claims. The kit's calls, minutes on the
    shipped pair, are only bound to their signatures."""
    example, own_module, more, on_a_mesh, kit = _blocks("README.md")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "tokens per target pass" in capsys.readouterr().out
    assert len(example.strip().splitlines()) <= 12
    exec(compile(more, "README.md", "exec"), names)
    assert "reached max_new_tokens" in capsys.readouterr().out
    exec(compile(own_module, "README.md", "exec"), {})
    assert "Runs without a cache" in capsys.readouterr().out
    called = []
    for name in ("check_drafter", "check_model", "check_verifier"):
        signature = inspect.signature(getattr(testing, name))
        monkeypatch.setattr(
            testing, name, lambda *args, _of=signature, **options: called.append(_of.bind(*args, **options))
        )
    exec(compile(kit, "README.md", "exec"), names)
    assert len(called) == 3
    exec(compile(on_a_mesh, "README.md", "exec"), names)
    assert len(names["out"].new_tokens()[0]) == 8


def test_a_drafter_in_one_file():
    """Catches a CONTRIBUTING whose drafter no longer works, or breaks the contract that it goes on to check."""
    names: dict = {}
    for block in _blocks("CONTRIBUTING.md"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
