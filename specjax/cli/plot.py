"""Speed-up against draft length and batch as a picture; needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specjax.cli.bench import Speed
from specjax.stats import BUSY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#2f8fd6", "#e0902b", "#2aa06a", "#a26bd4", "#d9534f", "#7a7a7a")


def check(path: Path) -> None:
    """Whether a picture can be drawn there, before minutes of measuring.

    Raises:
      ImportError: no matplotlib.
      ValueError: not a .png, .svg or .pdf, or a folder that does not exist.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'specjax[plot]'.") from error
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: give a name that ends in .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: the folder {path.absolute().parent} does not exist.")


def speedups(found: Sequence[Speed]) -> Figure:
    """A line for each batch size over the fixed draft lengths; a star for each adaptive controller.

    The star is at the mean draft length of the controller's rounds; a dashed line extends its speed-up over the plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="#888888", linewidth=1)
    for colour, speed in zip(_COLOURS * len(found), found, strict=False):
        fixed = [line for line in speed.lines if line.controller == "fixed"]
        rows = f"batch {speed.setting.batch}"
        sizes = [line.draft_len or 0 for line in fixed]
        axes.plot(sizes, [line.speedup for line in fixed], "o-", color=colour, label=rows)
        for line in (line for line in speed.lines if line.controller not in ("fixed", None)):
            counts = line.draft_lengths
            mean = sum(size * count for size, count in enumerate(counts)) / max(sum(counts), 1)
            axes.axhline(line.speedup, color=colour, linestyle="--", linewidth=1)
            axes.plot(
                [mean], [line.speedup], "*--", color=colour, linewidth=1, markersize=15,
                label=f"{line.controller}, {rows}, at its mean K",
            )  # fmt: skip
    axes.set_xlabel("tokens drafted in a round, K")
    axes.set_ylabel("speed-up over plain decoding")
    first = found[0]
    title = f"{first.machine.name}, {first.dtype}, temperature {first.setting.temperature:g}"
    if any(line.busy for speed in found for line in speed.lines):
        title += f"\n{BUSY}"
    axes.set_title(title, fontsize=10)
    axes.set_ylim(0, 1.08 * max(line.speedup for speed in found for line in speed.lines))
    axes.set_xlim(left=-0.3)  # room for a star at 0
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(found: Sequence[Speed], path: Path) -> None:
    """Draws `speedups` into a file; a failure leaves no partial file there."""
    half = path.with_name(f".{path.stem}.part{path.suffix}")
    speedups(found).savefig(half, dpi=160)
    half.replace(path)
