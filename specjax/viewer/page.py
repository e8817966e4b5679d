"""The page: a template with styles, script and data put in."""

from __future__ import annotations

import json
import re
from html import escape
from importlib import resources

from specjax.viewer.trace import Trace, as_json

_DIGITS = 6  # of probabilities
_LONGEST_TITLE = 60


def page(trace: Trace) -> str:
    """The whole page, ASCII but for the template's own signs; write it in UTF-8.

    Prompts and tokens are only data to the page, even if they hold tags, quotes, control or partial characters.

    >>> from specjax.viewer.trace import Trace
    >>> page(Trace([], {"note": "</script>"})).count("</script>")
    2
    """
    title = " ".join(trace.rows[0].prompt.split())[:_LONGEST_TITLE] if trace.rows else ""
    parts = {
        "title": escape(title.encode(errors="replace").decode()),
        "style": _file("page.css"),
        "script": _file("page.js"),
        "trace": _data(trace),
    }
    # One pass over the template: inserted parts are never searched for placeholders.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))


def _data(trace: Trace) -> str:
    # No "<" in the data may end its script element or open a comment.
    return json.dumps(_rounded(as_json(trace)), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(value):
    match value:
        case float():
            return float(f"{value:.{_DIGITS}g}")
        case dict():
            return {name: _rounded(part) for name, part in value.items()}
        case list():
            return [_rounded(part) for part in value]
    return value


def _file(name: str) -> str:
    return (resources.files("specjax.viewer") / name).read_text(encoding="utf-8")
