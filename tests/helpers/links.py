"""Links of Markdown files, followed without a network: files and headings here, the mere form of what is elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

_FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s>]*(?:\([^()\s]*\)[^()\s>]*)*)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ *\[[^\]^]+\]:\s+<?(\S+?)>?\s*$", re.MULTILINE)
_BARE = re.compile(r"<(https?:[^>]*)>")
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$", re.MULTILINE)


def targets(markdown: str) -> list[str]:
    """What the links and images of a page point to; code is no link."""
    text = _FENCE.sub("", markdown)
    named = _CODE.sub("code", text)
    return [*_LINK.findall(named), *_REFERENCE.findall(named), *_BARE.findall(named)]


def anchors(markdown: str) -> set[str]:
    """What a link into the page may name: headings as GitHub makes anchors of them, ids, entries of the reference."""
    text = _FENCE.sub("", markdown)
    found: dict[str, int] = {}
    names = set(re.findall(r"\bid=\"([^\"]+)\"", text)) | set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for heading in _HEADING.findall(text):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def broken(page: Path, root: Path) -> list[str]:
    """What is wrong with the links of a page, one sentence each."""
    wrong = []
    for link in targets(page.read_text(encoding="utf-8")):
        parts = urlsplit(link)
        if parts.scheme in ("http", "https"):
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc):
                wrong.append(f"{link}: no host")
            continue
        if parts.scheme:
            if parts.scheme != "mailto":
                wrong.append(f"{link}: neither a path nor http")
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        if not file.is_relative_to(root) or not file.exists():
            wrong.append(f"{link}: there is no {parts.path}")
        elif parts.fragment and (
            file.suffix != ".md" or parts.fragment not in anchors(file.read_text(encoding="utf-8"))
        ):
            wrong.append(f"{link}: {file.name} has no #{parts.fragment}")
    return wrong
