"""The expected speed-up against the draft length, by the formula of Leviathan et al., arXiv:2211.17192, theorem 3.8."""

from __future__ import annotations

from matplotlib import pyplot
from style import INK, SERIES, save

from specjax.stats import predicted_speedup

LENGTHS = range(1, 21)


def main() -> None:
    """One panel for each cost of a draft step; a dot marks the best draft length."""
    figure, panels = pyplot.subplots(1, 3, figsize=(9.2, 3.4), sharey=True, layout="constrained")
    for panel, cost in zip(panels, (0.02, 0.1, 0.3), strict=True):
        for alpha, colour in zip((0.9, 0.8, 0.6, 0.4), SERIES, strict=False):
            gains = [predicted_speedup(alpha, length, cost) for length in LENGTHS]
            panel.plot(LENGTHS, gains, color=colour, label=f"{alpha:.0%} accepted")
            best = max(LENGTHS, key=lambda length: gains[length - 1])
            panel.plot(best, gains[best - 1], "o", color=colour)
        panel.axhline(1, color=INK, linewidth=1, linestyle=":")
        panel.set_title(f"a draft step costs {cost:.0%}\nof a target step", fontsize=11)
        panel.set_xlabel("K, tokens drafted in a round")
        panel.set_xticks((1, 5, 10, 15, 20))
    panels[0].set_ylabel("times as fast as plain decoding")
    panels[2].legend(loc="upper right", fontsize=10)
    save(figure, "speedup")


if __name__ == "__main__":
    main()
