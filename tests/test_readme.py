"""The README's Python example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_example_runs(capsys):
    """Catches a README that has fallen behind; the example asserts what it claims."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "tokens per target pass" in capsys.readouterr().out
