"""How often a draft token stays, by its position in the draft: the shipped pair, from measured.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from style import ACCEPTED, DRAFT, TARGET, save

MEASURED = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))


def main() -> None:
    """Left: of the rounds in which a position's turn came. Right: of all rounds."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.2, 3.1), sharey=True, layout="constrained")
    position = np.arange(1, MEASURED["longest"] + 1)
    for temperature, colour in (("0.0", TARGET), ("0.8", DRAFT), ("1.0", ACCEPTED)):
        counts = MEASURED["by_temperature"][temperature]
        tested, accepted = np.array(counts["tested"]), np.array(counts["accepted"])
        label = f"temperature {float(temperature):g}"
        left.plot(position, accepted / tested, "o-", color=colour, label=label)
        right.plot(position, accepted / tested[0], "o-", color=colour, label=label)
    left.set_title("where all before it had stayed", fontsize=11)
    right.set_title("of all rounds", fontsize=11)
    left.set_ylabel("share of draft tokens kept")
    for panel in (left, right):
        panel.set_xlabel("position in the draft")
        panel.set_ylim(0, 1)
        panel.set_xticks(position)
    right.legend(fontsize=10)
    save(figure, "acceptance")


if __name__ == "__main__":
    main()
