"""What `specjax bench` measures: the time of a step and of a round on this machine, beside what the machine allows."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import stats
from specjax.cli.comparison import (
    PLAIN,
    SHORTER,
    Comparison,
    Setting,
    Timed,
    Way,
    compile_all,
    prepare,
    speedup,
    time_all,
    together,
)
from specjax.cli.load_pair import Pair
from specjax.costs import Profile
from specjax.profiling import roofline
from specjax.profiling.machine import Machine, this_machine
from specjax.profiling.roofline import Work
from specjax.types import Stats

_log = logging.getLogger(__name__)


class Line(NamedTuple):
    """One way to decode."""

    draft_len: int | None  # K; None is plain decoding
    controller: str | None  # None is plain decoding
    batch: int
    seconds: float  # of one step or round, less prefill and the call
    tokens_per_pass: float  # emitted by each row in one step or round
    acceptance: float | None  # accepted over drafted tokens
    tokens_per_second: float  # all rows, while all are at work
    speedup: float  # over plain decoding, the median of `speedups`
    speedups: list[float]  # of each turn, steps and rounds timed one after the other
    busy: bool  # those differ so much that nothing follows from them
    call_tokens_per_second: float  # of whole calls, prefill and the wait for the last row included
    call_speedup: float
    work: Work  # of one step or round
    limit_seconds: float  # what the machine needs at least for that work
    draft_lengths: list[int]  # rounds that drafted 0, 1, ..., K tokens for a row
    draft_utilisation: float | None  # accepted tokens over the places for draft tokens that were paid for
    acceptance_by_position: list[float | None]
    predicted_speedup: float | None  # by the profile
    time_split: dict[str, float] | None  # seconds of a round by the profile: drafting, verification, plain


class Speed(NamedTuple):
    """What was found."""

    lines: list[Line]  # plain decoding first
    setting: Setting
    machine: Machine
    live: float  # mean tokens in the cache of a row while it was measured
    dtype: str


def measure(
    pair: Pair,
    setting: Setting,
    busy: Callable[[str], AbstractContextManager[Any]],
    machine: Machine | None = None,
    kept_in: Path | None = None,
) -> Speed:
    """Plain decoding and speculation for each K, in turn and on the same prompts, `setting.repeats` times.

    Everything is generated to two lengths by one program; the difference in time over the difference in steps or
    rounds is the time of one, without prefill, compilation or what a call costs. Prompts are definitions in modules of
    the standard library; no stop token ends a row early.

    Args:
      pair: target, draft and tokenizer.
      setting: what to measure.
      busy: called with what is going on, for a spinner.
      machine: its limits; None looks them up, or measures them where the device is not known.
      kept_in: a folder for profiles, which adaptive controllers need; None measures anew.

    Raises:
      ValueError: max_new_tokens below 4 * (K + 1): too few rounds to tell them from the rest.
    """
    comparison = prepare(pair, setting, busy, kept_in)
    setting = comparison.setting
    dtype = floating_dtype(pair)
    compile_all(comparison, busy)
    with busy("what this machine can do"):
        machine = machine or this_machine(dtype)
    timed = time_all(comparison, busy)
    live = setting.context + (1 + 1 / SHORTER) * setting.max_new_tokens / 2
    with busy("counting bytes and operations"):
        lines = [_line(pair, comparison, machine, live, way, timed) for way in comparison.runs]
    return Speed(lines, setting, machine, live, str(dtype))


def _line(
    pair: Pair, comparison: Comparison, machine: Machine, live: float, way: Way, timed: dict[Way, list[Timed]]
) -> Line:
    setting, own, plain = comparison.setting, timed[way], timed[PLAIN]
    whole = together(own[0].whole)
    lengths = stats.draft_lengths(whole)
    works = _works(pair, setting, live, way, lengths)
    middle = statistics.median(x.seconds for x in own)
    if middle <= 0:
        _log.warning(
            "%s: long generations took no longer than short ones, so its numbers are noise. More --prompts, --repeats "
            "or --max-new-tokens help.", way,
        )  # fmt: skip
    call = statistics.median(x.call_seconds for x in own)
    per_pass = own[0].tokens_per_pass  # the same in every repetition: so are the keys
    gain = speedup(plain, own)
    split = _split(own[0].between, comparison.profiles.get(way), live)
    return Line(
        draft_len=way.draft_len if way.policy else None,
        controller=way.policy.value if way.policy else None,
        batch=setting.batch,
        seconds=middle,
        tokens_per_pass=per_pass,
        acceptance=_known(stats.acceptance_rate(whole)),
        tokens_per_second=setting.batch * per_pass / middle,
        speedup=gain.median,
        speedups=list(gain.turns),
        busy=gain.is_busy,
        call_tokens_per_second=setting.prompts * setting.max_new_tokens / call,
        call_speedup=statistics.median(a.call_seconds / b.call_seconds for a, b in zip(plain, own, strict=True)),
        work=_mean([(share, roofline.total(passes)) for share, passes in works]),
        limit_seconds=sum(share * roofline.seconds(passes, machine) for share, passes in works),
        draft_lengths=lengths.tolist() if way.policy else [],
        draft_utilisation=_known(stats.draft_utilisation(whole)),
        acceptance_by_position=[_known(share) for share in stats.acceptance_by_position(whole).tolist()],
        predicted_speedup=None if split is None else split.pop("speedup"),
        time_split=split,
    )


def _known(share: float) -> float | None:
    return None if math.isnan(share) else share


def _mean(works: list[tuple[float, Work]]) -> Work:
    return Work(*(sum(share * getattr(work, name) for share, work in works) for name in Work._fields))


def _works(pair: Pair, setting: Setting, live: float, way: Way, lengths: np.ndarray) -> list[tuple[float, Any]]:
    """(share of the rounds, the passes of such a round) for each draft length that came."""
    target, draft = pair.target, pair.draft
    where: dict[str, Any] = {"batch": setting.batch, "live": live}
    if way == PLAIN:
        return [(1.0, roofline.step(target.model, target.params, **where))]
    counts = {size: count for size, count in enumerate(lengths) if count} if way.adapts else {way.draft_len: 1}
    works = []
    for size, count in counts.items():
        if size == 0:
            passes = roofline.step(target.model, target.params, **where)
        else:
            passes = roofline.speculation(
                target.model, target.params, draft.model, draft.params, draft_len=size, **where
            )
        works.append((float(count) / sum(counts.values()), passes))
    return works


def _split(parts: Sequence[Stats], profile: Profile | None, live: float) -> dict[str, float] | None:
    """Seconds of a round by the profile, and the speed-up that they predict."""
    if profile is None:
        return None
    splits = [stats.time_split(part, profile, context=live) for part in parts]
    rounds = sum(int(part.rounds.max()) for part in parts)
    fields = {name: sum(getattr(split, name) for split in splits) / rounds for name in stats.Split._fields}
    return {**fields, "speedup": stats.profiled_speedup(*parts, profile=profile, context=live)}


def floating_dtype(pair: Pair) -> Any:
    """What the target computes in: the dtype of most of its floating-point parameters."""
    sizes: dict[Any, int] = {}
    for leaf in jax.tree.leaves(pair.target.params):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.size
    return jnp.dtype(max(sizes, key=sizes.__getitem__))
