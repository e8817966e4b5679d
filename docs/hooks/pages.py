"""The site's own needs: pages that live outside docs/, links between the two, and figures that follow the palette."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "https://github.com/specjax/specjax/blob/main/"
# Files of the repository that are pages of the site, too.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "results.md",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FIGURE = re.compile(r"!\[([^\]]*)\]\((figures/[\w-]+\.svg)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that live outside docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are right in the repository become right in the site; what is no page is shown at its source."""
    del config
    where = {page_: path for path, page_ in OUTSIDE.items()}
    own = where.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), match[2]))
        inside = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if path == "README.md":
            inside = "index.md"
        if inside is None:
            return f"{match[1]}{SOURCE}{path}{match[3]}"
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{match[1]}{posixpath.relpath(inside, start)}{match[3]}"

    def figure(match: re.Match[str]) -> str:
        svg = (ROOT / "docs" / match[2]).read_text(encoding="utf-8")
        label = match[1].replace('"', "&quot;")
        return f'<figure class="drawn" role="img" aria-label="{label}">{svg[svg.index("<svg") :]}</figure>'

    parts = re.split(r"(^```.*?^```$)", _FIGURE.sub(figure, markdown), flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)
