"""What the reference needs and griffe leaves out: comments behind fields and parameters, which hold their shapes.

Docstrings get an Attributes or Args section made of them; doctests become code blocks, arXiv numbers links.
"""

from __future__ import annotations

import functools
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import griffe


class Fields(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        """Called once for everything that is loaded."""
        text = obj.docstring.value if obj.docstring else ""
        if obj.is_class:
            text = _with_attributes(obj, text)
        elif obj.is_function and "\nArgs:" not in text:
            text = _with_parameters(obj, text)
        elif obj.is_attribute and not text and obj.parent.is_module:
            text = _comment(obj.filepath, obj.lineno, obj.endlineno)
        if text:
            # "a, b: both of them" becomes two entries.
            text = re.sub(r"^( +)(\w+), (\w+): (.*)", r"\1\2: As `\3`.\n\1\3: \4", text, flags=re.MULTILINE)
            obj.docstring = griffe.Docstring(
                _as_markdown(text), parent=obj, lineno=obj.lineno, parser=loader.docstring_parser,
                parser_options=loader.docstring_options,
            )  # fmt: skip


def _with_attributes(cls: griffe.Object, text: str) -> str:
    """The docstring with every field of a NamedTuple and member of an enum; they are no members of the class then."""
    lines = []
    for name, field in list(cls.members.items()):
        if field.is_alias or not field.is_attribute or name.startswith("_") or "property" in field.labels:
            continue
        typed = name if field.annotation is None else f"{name} ({field.annotation})"
        default = "" if field.value is None else f" Default `{field.value}`."
        comment = _comment(field.filepath, field.lineno, field.endlineno)
        if re.search(rf"^  {name}: ", text, re.MULTILINE):  # the docstring says it, in an order of its own
            text = re.sub(rf"^  {name}: (.*)", lambda m, t=typed, d=default: f"  {t}: {m[1]}{d}", text, flags=re.M)
        elif field.annotation is None:  # a member of an enum
            lines.append(f"  {name}: `{field.value}`{', ' + comment if comment else ''}")
        else:
            comment = f"{comment.rstrip('.')}." if comment else ""
            lines.append(f"  {typed}: {(comment + default).strip() or '&nbsp;'}")
        cls.del_member(name)
    return "\n".join([text, "", "Attributes:", *lines]) if lines else text


def _with_parameters(function: griffe.Object, text: str) -> str:
    """The docstring with comments that stand behind parameters, where a signature has one to a line."""
    path, found = function.filepath, []
    for number in range(function.lineno, function.endlineno + 1):
        comment = _comments(path).get(number, "")
        name = re.match(r"\s+(\w+):", _lines(path)[number - 1])
        if comment and name and name[1] in function.parameters:
            found.append(f"  {name[1]}: {comment}")
    given = _comments(path).get(function.endlineno)
    returned = ["", "Returns:", f"  {given}"] if given else []
    return "\n".join([text, "", "Args:", *found, *returned]) if found else text


def _comment(path: Path, first: int, last: int) -> str:
    """The comment behind a statement, or the ones above it."""
    behind = _comments(path).get(last)
    if behind:
        return behind
    above, number = [], first - 1
    while number in _comments(path) and _lines(path)[number - 1].lstrip().startswith("#"):
        above.insert(0, _comments(path)[number])
        number -= 1
    return " ".join(above)


@functools.cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@functools.cache
def _comments(path: Path) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _as_markdown(text: str) -> str:
    fenced, is_example = [], False
    for line in text.splitlines():
        starts = line.startswith(">>>")
        if starts and not is_example:
            fenced.append("```pycon")
        if is_example and not line.strip():
            fenced.append("```")
        is_example = bool(line.strip()) and (is_example or starts)
        fenced.append(line)
    if is_example:
        fenced.append("```")
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n".join(fenced))
