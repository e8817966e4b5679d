"""Text as HTML for notebooks; the colour and the line of each token show where it came from.

All styles are inline, so they do not affect the page around the text. Text keeps the page's own colour and the tints
are transparent, so it is readable on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_LINES = {
    "accepted": ("rgba(46,160,87,.20)", "2px solid #2ea057", "drafted and kept"),
    "corrected": ("rgba(214,128,20,.26)", "3px double #d07a12", "the target's, in place of a rejected draft token"),
    "bonus": ("rgba(76,141,255,.24)", "2px dashed #4c8dff", "the target's, after a draft that was kept whole"),
    "first": ("rgba(128,128,128,.20)", "2px dotted #8a8f98", "from the prompt"),
}
_FONT = "font:13px/1.75 ui-monospace,Menlo,Consolas,monospace"
_BLOCK = f"white-space:pre-wrap;overflow-wrap:anywhere;{_FONT}"
_NOTE = "font-size:12px;opacity:.9;margin:2px 0 14px"


class Passage(NamedTuple):
    """A prompt, and its continuation token by token."""

    prompt: str
    tokens: Sequence[tuple[str, str, str]]  # text, kind, tooltip
    caption: str


def document(passages: Sequence[Passage]) -> str:
    """The passages one below the other, and a legend.

    >>> document([Passage("a<", [("b", "bonus", "target 1")], "1 token")]).count("&lt;")
    1
    """
    legend = " &nbsp; ".join(f"{_span(kind, kind, '')} {meaning}" for kind, (_, _, meaning) in _LINES.items())
    return "".join(map(_passage, passages)) + f'<div style="{_NOTE}">{legend}</div>'


def _passage(passage: Passage) -> str:
    tokens = "".join(_span(*token) for token in passage.tokens)
    prompt = f'<span style="opacity:.8">{_escaped(passage.prompt)}</span>'
    return f'<div style="{_BLOCK}">{prompt}{tokens}</div><div style="{_NOTE}">{_escaped(passage.caption)}</div>'


def _span(text: str, kind: str, hint: str) -> str:
    tint, line, _ = _LINES[kind]
    title = f' title="{_escaped(hint)}"' if hint else ""
    # A newline alone would leave no area for the mouse.
    shown = _escaped(text).replace("\n", "↵\n")
    return f'<span style="background:{tint};border-bottom:{line}"{title}>{shown}</span>'


def _escaped(text: str) -> str:
    # Lone surrogates, which undecodable command-line arguments contain, cannot be encoded.
    return escape(text.encode(errors="replace").decode())
