"""One round as a picture: a greedy round of the shipped pair, from measured.json."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from style import ACCEPTED, DRAFT, INK, REJECTED, TARGET, save

ROUND = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))["round"]
WIDE, HIGH, STEP = 0.86, 0.5, 1.0
LEFT = 1.2  # where the first column stands


def main() -> None:
    """Four rows: the drafter's steps, the target's one pass, the verdict, and what the text gains."""
    drafted, says, kept = ROUND["drafted"], ROUND["target_says"], ROUND["num_accepted"]
    figure, axes = pyplot.subplots(figsize=(9.2, 3.9), layout="constrained")
    axes.set_axis_off()
    rows = {"draft": 3.3, "verify": 2.2, "accept": 1.1, "commit": 0.0}
    notes = {
        "draft": f"{len(drafted)} small steps,\none after the other",
        "verify": "one pass of the target:\nwhat it says after each",
        "accept": "the longest prefix\nthat agrees stays",
        "commit": "and the target's own\nnext token; the caches\nforget the rest",
    }
    for name, height in rows.items():
        axes.text(-0.55, height, name, weight="bold", va="center")
        axes.text(LEFT + 5.15, height, notes[name], va="center", fontsize=9.5)
    _box(axes, 0, rows["draft"], ROUND["last"], INK)
    axes.text(LEFT, rows["draft"] + 0.4, "last token", ha="center", fontsize=9)
    _box(axes, 0, rows["verify"], says[0], TARGET)
    for column, token in enumerate(drafted, start=1):
        _box(axes, column, rows["draft"], token, DRAFT)
        _arrow(axes, column - 1 + WIDE / 2, rows["draft"], column - WIDE / 2, rows["draft"], DRAFT)
        _box(axes, column, rows["verify"], says[column], TARGET)
    for column in range(len(drafted) + 1):
        _arrow(axes, column, rows["draft"] - HIGH / 2, column, rows["verify"] + HIGH / 2, TARGET)
    for column, token in enumerate(drafted, start=1):
        stays = column <= kept
        _box(axes, column, rows["accept"], token, ACCEPTED if stays else REJECTED, struck=not stays)
    _arrow(axes, kept + 0.1, rows["verify"] - HIGH / 2, kept + 0.9, rows["commit"] + HIGH / 2, TARGET)
    for column, token in enumerate(ROUND["emitted"], start=1):
        _box(axes, column, rows["commit"], token, ACCEPTED if column <= kept else TARGET)
    axes.text(LEFT + kept + 1.55, rows["commit"], f"{kept + 1} tokens\nfor one pass", va="center", fontsize=9.5)
    axes.set_xlim(-0.6, LEFT + 7.3)
    axes.set_ylim(-0.45, 4.0)
    save(figure, "round")


def _box(axes: Axes, column: float, height: float, token: str, colour: str, struck: bool = False) -> None:
    corner = (LEFT + column * STEP - WIDE / 2, height - HIGH / 2)
    axes.add_patch(
        FancyBboxPatch(corner, WIDE, HIGH, "round,pad=0,rounding_size=0.1", fill=False, edgecolor=colour, linewidth=1.8)
    )
    shown = token.replace(" ", "␣").replace("\n", "⏎")
    axes.text(LEFT + column * STEP, height, shown, ha="center", va="center", family="monospace", fontsize=10)
    if struck:
        middle = LEFT + column * STEP
        axes.plot((middle - WIDE / 2, middle + WIDE / 2), (height, height), color=colour, linewidth=1.5)


def _arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 1, "shrinkB": 1}
    axes.annotate("", (LEFT + to_x, to_y), (LEFT + x, y), arrowprops=style)


if __name__ == "__main__":
    main()
