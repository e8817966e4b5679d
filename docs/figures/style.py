"""How the figures of these pages look, and how they are written: SVG whose ink follows the palette of the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
TARGET, DRAFT, ACCEPTED, REJECTED = "#2f8fd6", "#e0902b", "#2aa06a", "#d9534f"  # legible on white and on black
SERIES = (TARGET, DRAFT, ACCEPTED, "#a26bd4", REJECTED)
INK = "#010203"  # stands for the colour of the text around the figure
_FAINT = "#020304"

pyplot.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files, the reader's own font
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _FAINT,
        "grid.linewidth": 0.6,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
)


def save(figure: Figure, name: str) -> None:
    """Writes NAME.svg into the folder named on the command line, or beside the scripts."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    matplotlib.rcParams["svg.hashsalt"] = name
    path = folder / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
    path.write_text(_small(path.read_text(encoding="utf-8")), encoding="utf-8")


def _small(svg: str) -> str:
    """Without what only an editor needs; a style sheet would reach the whole page that the figure stands in."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}", tag[0]), svg)
    svg = svg.replace(INK, "currentColor").replace(_FAINT, "#80808055")
    svg = re.sub(r"^<svg", '<svg class="drawn" stroke-linejoin="round"', svg)
    # Read by itself, as on a forge, it follows the reader's system.
    style = "<style>svg.drawn{color:#24292f}@media (prefers-color-scheme:dark){svg.drawn{color:#d5d9de}}</style>"
    start = svg.index(">") + 1
    lines = [line.rstrip() for line in (svg[:start] + style + svg[start:]).splitlines() if line.strip()]
    return "\n".join(lines) + "\n"
