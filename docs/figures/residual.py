"""One drafted place as probability mass: what is kept and what is drawn anew add up to the target's distribution."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot
from style import ACCEPTED, DRAFT, INK, REJECTED, TARGET, save

TOKENS = ("the", "a", "this", "my", "no")
TARGET_PROBS = np.array([0.40, 0.25, 0.20, 0.10, 0.05])
DRAFT_PROBS = np.array([0.25, 0.45, 0.05, 0.15, 0.10])


def main() -> None:
    """Two panels: both distributions; and the same target, made of kept drafts and of redrawn tokens."""
    kept = np.minimum(TARGET_PROBS, DRAFT_PROBS)  # drawn from the draft, and accepted with min(1, target / draft)
    redrawn = TARGET_PROBS - kept  # in all 1 - sum(kept), shared out as max(target - draft, 0)
    np.testing.assert_allclose(redrawn.sum(), 1 - kept.sum())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.2, 3.2), sharey=True, layout="constrained")
    place = np.arange(len(TOKENS))
    left.bar(place - 0.2, DRAFT_PROBS, 0.38, color=DRAFT, label="draft's distribution")
    left.bar(place + 0.2, TARGET_PROBS, 0.38, color=TARGET, label="target's distribution")
    left.set_title("what the two models say")
    right.bar(place, kept, 0.5, color=ACCEPTED, label=f"drafted and kept: {kept.sum():.0%}")
    right.bar(place, redrawn, 0.5, kept, color=TARGET, label=f"from the residual distribution: {redrawn.sum():.0%}")
    lost = np.maximum(DRAFT_PROBS - TARGET_PROBS, 0)
    right.bar(
        place, lost, 0.5, TARGET_PROBS, fill=False, edgecolor=REJECTED, linestyle="--",
        label=f"drafted and rejected: {lost.sum():.0%}",
    )  # fmt: skip
    right.plot(place, TARGET_PROBS, "_", color=INK, markersize=34, markeredgewidth=2)
    right.set_title("what comes out: the target's distribution again")
    for panel in (left, right):
        panel.set_xticks(place, TOKENS)
        panel.grid(axis="x", visible=False)
        panel.legend(loc="upper right", fontsize=10)
    left.set_ylabel("probability")
    save(figure, "residual")


if __name__ == "__main__":
    main()
