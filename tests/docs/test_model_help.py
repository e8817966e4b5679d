"""What a Model's author is shown: the signatures, the same in help(), on the page and in the code."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path

import pytest
import tiny

import specjax
from specjax import testing, types

PAGE = Path(__file__).parents[2] / "docs" / "write-a-model.md"


def _signature(function) -> str:
    """Parameters and defaults alone: "(cache, block, keep, path=None)"."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for name, p in signature.parameters.items() if name != "self"]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


SIGNATURES = [
    f"apply{_signature(types.Apply.__call__)} -> Output",
    "init_cache(params, batch, slots) -> cache",
    "init_block(params, batch, size) -> block",
    f"commit{_signature(types.Commit.__call__)} -> cache",
]


def test_help_and_page_show_the_signatures():
    """Catches a help(specjax.Model) of nothing but field numbers, and a page or docstring behind the code."""
    shown = pydoc.render_doc(specjax.Model, renderer=pydoc.plaintext)
    page = PAGE.read_text(encoding="utf-8")
    for signature in SIGNATURES:
        assert signature in shown
        assert signature in page
    assert "check_model" in shown


@pytest.mark.parametrize("name", ["table", "llama"])
def test_signatures_are_those_of_real_models(name):
    """Catches signatures that no Model has: the loop passes rows, slots, blocks and paths by these places."""
    model = tiny.model(name)[0] if name == "llama" else testing.table_model(1, 5)
    assert list(inspect.signature(model.init_cache).parameters) == ["params", "batch", "slots"]
    assert list(inspect.signature(model.init_block).parameters) == ["params", "batch", "size"]
    assert list(inspect.signature(model.commit).parameters)[:4] == ["cache", "block", "keep", "path"]
    assert list(inspect.signature(model.apply).parameters)[:4] == ["params", "tokens", "cache", "block"]
