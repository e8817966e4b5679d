"""Texts that try to be more than text."""

from __future__ import annotations

from specjax.types import Status
from specjax.viewer.trace import Kind, Token, TracedRound, TracedRow

TEXTS = [
    "</script><script>document.title = 'broken'</script>", "<!--<script>", "\"'`${x}\\", "{{script}}", "&lt;b&gt;",
    "\n", " ", "\t\t", "", "\ufffd", "🙂", "👩\u200d🔬", "\u202eabc", "\u200b", "\x00\x1b[31m", "\ud800", "\u2028",
    "a" * 300, "日本語",
]  # fmt: skip


def _token(text, kind, draft_prob=None, *, place=0):
    return Token(place, text, kind, 0.125, 0.25, draft_prob)


def row():
    """Every hostile text as a drafted token, in the prompt and in the text."""
    rounds = [
        TracedRound([_token(text, Kind.ACCEPTED, 0.5, place=place)], _token(text, Kind.BONUS, place=place), text * 2)
        for place, text in enumerate(TEXTS)
    ]
    return TracedRow("".join(TEXTS), TracedRound([], None, ""), rounds, Status.STOPPED)
