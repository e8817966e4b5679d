"""The shells of docs/adapters.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

_PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"


def classes(library: str) -> dict:
    """What the page's block that imports `library` defines."""
    blocks = re.findall(r"```py\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if re.search(rf"^import {library}\b", block, re.MULTILINE)]
    names: dict = {"__name__": "recipe"}
    exec(compile(block, str(_PAGE), "exec"), names)
    return names
