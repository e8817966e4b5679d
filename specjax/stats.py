"""What the counts of a generation mean: acceptance rate, tokens per round, predicted speed-up."""

from __future__ import annotations

import numpy as np

from specjax.types import Stats


def acceptance_rate(stats: Stats) -> float:
    """Accepted over drafted tokens, all rows together; NaN where nothing was drafted.

    >>> import numpy as np
    >>> counts = Stats(np.array([4]), np.array([10]), np.array([[4, 4]]), np.array([[4, 3]]), np.array([[3, 3]]),
    ...                np.array([[0, 0, 4]]))
    >>> acceptance_rate(counts)
    0.75
    """
    return _ratio(stats.accepted, stats.drafted)


def token_acceptance(stats: Stats) -> float:
    """alpha: accepted over tested tokens, a token being tested when all before it in its round were accepted."""
    return _ratio(stats.accepted, stats.tested)


def acceptance_by_position(stats: Stats) -> np.ndarray:
    """[K] float64: of the rounds in which position i was tested, the share that accepted it; NaN where none was."""
    accepted, tested = (np.asarray(counts, np.float64).sum(0) for counts in (stats.accepted, stats.tested))
    return np.divide(accepted, tested, out=np.full_like(accepted, np.nan), where=tested > 0)


def tokens_per_round(stats: Stats) -> float:
    """Tokens emitted per row and round: 1 is plain decoding, K + 1 the most."""
    return _ratio(stats.emitted, stats.rounds)


def expected_tokens_per_round(alpha: float, draft_len: int) -> float:
    """(1 - alpha^(K+1)) / (1 - alpha), bonus token included. Leviathan et al., arXiv:2211.17192, equation 1.

    >>> round(expected_tokens_per_round(0.8, 4), 3)
    3.362
    """
    return float(sum(alpha**position for position in range(draft_len + 1)))


def predicted_speedup(alpha: float, draft_len: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Expected speed-up over plain decoding.

    Args:
      alpha: acceptance of one tested token, in 0..1.
      draft_len: K.
      draft_cost: time of one draft step over that of one target step.
      verify_cost: time of verifying K + 1 tokens over that of one target step; the paper takes 1.

    Source: Leviathan et al., arXiv:2211.17192, theorem 3.8; unlike there, verification may cost more than one step.

    >>> round(predicted_speedup(0.8, 8, 0.05), 2)
    3.09
    """
    return expected_tokens_per_round(alpha, draft_len) / (draft_len * draft_cost + verify_cost)


def _ratio(above, below) -> float:
    total = float(np.sum(below))
    return float(np.sum(above)) / total if total > 0 else float("nan")
