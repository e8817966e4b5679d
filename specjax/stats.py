"""Numbers from the counts of a generation: acceptance rate, tokens per round, predicted speed-up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from specjax.costs import Profile
from specjax.traced import is_traced
from specjax.types import Stats

# Limit on highest / lowest of the middle four fifths of the turns. Normal noise of 5% gives 1.14; differences of a long
# and a short run, with six times the variance, give 1.36 (docs/notes/time-contenders-in-turn.md).
_WIDE = 1.4


class SpeedUp(NamedTuple):
    """How many times as fast one way was as another, timed in turn."""

    turns: tuple[float, ...]  # of each turn; 0 where a difference of two times is not above 0, because of noise

    @property
    def median(self) -> float:
        """The speed-up to report, if the turns agree."""
        return statistics.median(self.turns)

    @property
    def is_busy(self) -> bool:
        """Whether the turns differ so much that they give no result: other work slowed some of them down.

        They do if the highest is more than 1.4 times the lowest, without a tenth of the turns at either end (by
        interpolation, where there are few turns). A single turn is never busy.
        """
        if min(self.turns) <= 0:
            return True
        if len(self.turns) == 1:
            return False
        tenths = statistics.quantiles(self.turns, n=10, method="inclusive")
        return tenths[-1] > _WIDE * tenths[0]

    @property
    def range(self) -> str:
        """ "1.31 to 1.52 in 5 turns"."""
        if len(self.turns) == 1:
            return "1 turn"
        return f"{min(self.turns):.2f} to {max(self.turns):.2f} in {len(self.turns)} turns"

    def __str__(self) -> str:
        return f"{BUSY} ({self.range})" if self.is_busy else f"{self.median:.2f} times as fast ({self.range})"


BUSY = "this machine is busy: no verdict"


class Split(NamedTuple):
    """The seconds of a generation by kind of work, from a profile; without reading the prompts."""

    drafting: float  # going to drafts and back included
    verification: float  # the target's passes over drafts, acceptance, and the rest of such rounds
    plain: float  # rounds without a draft

    @property
    def total(self) -> float:
        """Seconds of all rounds."""
        return self.drafting + self.verification + self.plain


def zeros(batch: int, draft_len: int) -> Stats:
    """Counts of zero, as NumPy arrays."""
    none, by_position = np.zeros((batch,), np.int32), np.zeros((batch, draft_len), np.int32)
    by_longest, by_source = np.zeros((batch, draft_len + 1), np.int32), np.zeros((batch, 1), np.int32)
    return Stats(none, none, by_position, by_position, by_position, by_longest, by_source, by_source, none)  # type: ignore[arg-type]


def acceptance_rate(stats: Stats) -> float:
    """Accepted over drafted tokens, all rows together; NaN where nothing was drafted.

    >>> import numpy as np
    >>> acceptance_rate(zeros(1, 2)._replace(drafted=np.array([[4, 4]]), accepted=np.array([[3, 3]])))
    0.75
    """
    return _ratio(stats.accepted, stats.drafted)


def token_acceptance(stats: Stats) -> float:
    """alpha: accepted over tested tokens. A token is tested if all tokens before it in its round were accepted."""
    return _ratio(stats.accepted, stats.tested)


def acceptance_by_position(stats: Stats) -> np.ndarray:
    """[K] float64: of the rounds in which position i was tested, the share that accepted it; NaN where none was."""
    accepted, tested = (_on_host(counts).astype(np.float64).sum(0) for counts in (stats.accepted, stats.tested))
    return np.divide(accepted, tested, out=np.full_like(accepted, np.nan), where=tested > 0)


def tokens_per_round(stats: Stats) -> float:
    """Tokens emitted per row and round: 1 is plain decoding, K + 1 the most."""
    return _ratio(stats.emitted, stats.rounds)


def draft_lengths(stats: Stats) -> np.ndarray:
    """[K+1] int: how many rounds drafted 0, 1, ..., K tokens for a row, all rows together.

    >>> import numpy as np
    >>> draft_lengths(zeros(1, 2)._replace(rounds=np.array([5]), drafted=np.array([[4, 1]]))).tolist()
    [1, 3, 1]
    """
    drafted = _on_host(stats.drafted).sum(0)
    at_least = np.concatenate([[int(_on_host(stats.rounds).sum())], drafted, [0]])
    return at_least[:-1] - at_least[1:]


def draft_utilisation(stats: Stats) -> float:
    """Accepted tokens over the draft positions that the batch computed; NaN where there were none.

    Every row of a round costs as much as the longest draft; this is the share that was used.
    """
    longest = _on_host(stats.by_longest)
    return _ratio(stats.accepted, longest * np.arange(longest.shape[1]))


def time_split(stats: Stats, profile: Profile, *, context: float) -> Split:
    """Seconds of the rounds of one batch, from the draft lengths of its rounds and the costs in the profile.

    Args:
      stats: of one batch of rows that began together.
      profile: of the same models on the same device.
      context: tokens in the cache, the mean over the rounds.
    """
    by_longest = _on_host(stats.by_longest).astype(np.float64)
    costs = profile.at(len(by_longest), context)
    if by_longest.shape[1] > len(costs.rounds):
        raise ValueError(
            f"these statistics are of drafts of up to {by_longest.shape[1] - 1} tokens, the profile knows "
            f"{profile.longest} at most: make one with longest={by_longest.shape[1] - 1}."
        )
    last = int(np.argmax(stats.rounds))  # the last row to end took part in every round
    of_batch = by_longest[last]
    drafting = float(sum(count * seconds for count, seconds in zip(of_batch, costs.drafts, strict=False)))
    drafting += max(float(stats.switches[last]), 0.0) / 2 * costs.change  # every second one ends drafts
    verifying = zip(of_batch[1:], costs.verification()[1:], strict=False)
    verification = float(sum(count * seconds for count, seconds in verifying))
    return Split(drafting, verification, float(of_batch[0]) * costs.rounds[0])


def profiled_speedup(*parts: Stats, profile: Profile, context: float) -> float:
    """Predicted speed-up of one batch or several over plain decoding of the same tokens, reading the prompts left out.

    Plain decoding takes as many steps as the row of a batch with the most tokens. Arguments and errors as for
    `time_split`; NaN where there were no rounds.
    """
    seconds = sum(time_split(part, profile, context=context).total for part in parts)
    plain = sum(float(_on_host(part.emitted).max()) * profile.at(len(part.rounds), context).plain for part in parts)
    return plain / seconds if seconds > 0 else float("nan")


def speedup_in_turn(plain: Sequence[float], seconds: Sequence[float], *, tokens: float = 1.0) -> SpeedUp:
    """How many times as fast another way of decoding was as plain decoding, or that the machine was too busy.

    Args:
      plain: seconds that plain decoding took in each turn.
      seconds: those of the other way, measured right before or after plain decoding in the same turn.
      tokens: the tokens of the other way in that time, divided by those of plain decoding.

    Raises:
      ValueError: no turns, or different numbers of turns.

    >>> print(speedup_in_turn([1.0, 1.2, 1.1], [0.5, 0.6, 0.5]))
    2.00 times as fast (2.00 to 2.20 in 3 turns)
    >>> print(speedup_in_turn([1.0, 3.5, 1.1], [0.6, 0.6, 1.5]))
    this machine is busy: no verdict (0.73 to 5.83 in 3 turns)
    """
    if len(plain) != len(seconds) or not len(plain):
        raise ValueError(f"each turn needs the seconds of both ways, got {len(plain)} and {len(seconds)}: time both.")
    return SpeedUp(tuple(tokens * a / b if min(a, b) > 0 else 0.0 for a, b in zip(plain, seconds, strict=True)))


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
    total = float(_on_host(below).sum())
    return float(_on_host(above).sum()) / total if total > 0 else float("nan")


def _on_host(counts: ArrayLike) -> np.ndarray:
    if is_traced(counts):
        raise ValueError(
            "these statistics are numbers for the host, and their counts are still traced: return out.stats from the "
            "jitted function and call specjax.stats outside of it; inside, compute with the fields, as in "
            "out.stats.accepted.sum() / out.stats.drafted.sum()."
        )
    return np.asarray(counts)
