"""Jobs timed in turn: what slows a machine down for a while slows all of them, so times of one turn can be compared.

The medians of two jobs timed one after the other cannot: one may have had the slow minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def in_turn(
    jobs: Mapping[Name, Callable[[], Result]],
    turns: int,
    *,
    enough: Callable[[int], bool] = lambda done: False,
    around: Callable[[int], AbstractContextManager[Any]] = lambda turn: nullcontext(),
) -> dict[Name, list[Result]]:
    """Runs every job once a turn, in the order of the mapping.

    Args:
      jobs: what to run; each returns its seconds, alone or with more.
      turns: how many; 0 runs nothing.
      enough: asked after each turn with the number of turns done; True ends it.
      around: called with the number of each turn, from 1 on, for a context around each of its jobs (a spinner).

    Returns:
      What each job returned, turn by turn.

    >>> in_turn({"slow": lambda: 2.0, "fast": lambda: 1.0}, 2)
    {'slow': [2.0, 2.0], 'fast': [1.0, 1.0]}
    """
    results: dict[Name, list[Result]] = {name: [] for name in jobs}
    for turn in range(1, turns + 1):
        for name, job in jobs.items():
            with around(turn):
                results[name].append(job())
        if enough(turn):
            break
    return results


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Seconds of a job over those of a reference job, turn by turn: the median.

    >>> paired_ratio([2.0, 40.0, 2.2], [1.0, 20.0, 1.0])  # the second turn was slow for both
    2.0
    """
    return statistics.median(own / other for own, other in zip(seconds, reference, strict=True))
