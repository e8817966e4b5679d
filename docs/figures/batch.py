"""What a larger batch leaves of the gain: the limit that bytes and operations set, from measured.json."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot
from style import INK, SERIES, save

LIMIT = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))["limit_by_batch"]


def main() -> None:
    """One line a device."""
    figure, axes = pyplot.subplots(figsize=(7.0, 3.3), layout="constrained")
    for (label, gains), colour in zip(LIMIT["gains"].items(), SERIES, strict=False):
        axes.plot(LIMIT["batches"], gains, "o-", color=colour, markersize=4, label=label)
    axes.axhline(1, color=INK, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(LIMIT["batches"], [str(batch) for batch in LIMIT["batches"]])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of the batch")
    axes.set_ylabel("at most, times as fast\nas plain decoding")
    axes.legend(fontsize=10)
    save(figure, "batch")


if __name__ == "__main__":
    main()
