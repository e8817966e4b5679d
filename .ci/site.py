"""Looks over the built documentation: pages ask nothing of other hosts, and no docstring came out as a lump of text."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_FETCHED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
_IMPORTED = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])(?:https?:)?//[^)\"']*")
_LUMP = re.compile(r"<p>(?:Args|Returns|Raises|Attributes):.*|<p>(?:&gt;){3}.*")

site = Path(sys.argv[1])
wrong = []
for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
    text = path.read_text(encoding="utf-8")
    for pattern, what in ((_FETCHED, "fetches"), (_IMPORTED, "imports"), (_LUMP, "shows as plain text")):
        # A link to a page elsewhere is none of these; <link rel=canonical> and the like are only read by machines.
        found = [item for item in pattern.findall(text) if not re.search(r"rel=[\"']?(canonical|prev|next)", item)]
        wrong += [f"{path.relative_to(site)} {what} {item[:160]}" for item in found]
pages = len(list(site.rglob("*.html")))
print(*wrong, f"{pages} pages, {len(wrong)} faults", sep="\n")
sys.exit(bool(wrong) or not pages)
