"""Seconds of checking on this machine: is speculation exact here, and does it pay? `bench` measures both in depth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from specjax import controllers, drafters, testing
from specjax.cli.bench import floating_dtype
from specjax.cli.choose_controller import Policy
from specjax.cli.comparison import (
    PLAIN,
    SHORTER,
    Comparison,
    Setting,
    Way,
    compile_all,
    prepare,
    speedup,
    time_all,
)
from specjax.cli.exactness import Finding
from specjax.cli.load_pair import Pair
from specjax.decode.api import generate
from specjax.profiling import forward
from specjax.profiling.paired_timing import paired_ratio
from specjax.stats import BUSY, SpeedUp
from specjax.types import Sampling

Busy: TypeAlias = Callable[[str], AbstractContextManager[Any]]

DRAFT_LEN = 3
SETTING = Setting(draft_lens=(DRAFT_LEN,), prompts=3, max_new_tokens=96, repeats=5)
_SECONDS, _LEAST = 3.5, 3  # for all repetitions: a slow machine gets fewer of them, but not fewer than 3
# Seconds after which nothing more is begun. Compiling cannot be interrupted, so the check may end as much later as one
# compilation takes. Two idle cores need half of it the first time, two that six others share all of it.
_BUDGET = 90.0
_SAMPLES, _LENGTH, _PROMPT = 20_000, 4, [1, 2]
_FALSE_ALARM = 1e-6
_TIE = 1e-3  # of two logits in float32; rounding moves them by a hundredth of it
_EVEN = 0.05  # less than this is no difference: the measurement is not better


class Pace(NamedTuple):
    """How fast a pair decodes here."""

    draft_len: int
    step_seconds: float  # of plain decoding
    round_seconds: float
    round_cost: float  # a round in steps, the median of pairs
    pass_cost: float  # a pass over K + 1 tokens in passes over one, the same way
    tokens_per_round: float
    acceptance: float
    speedups: list[float]  # of each repetition
    dtype: str

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.tokens_per_round / self.round_cost

    @property
    def in_turn(self) -> SpeedUp:
        """By each repetition."""
        return SpeedUp(tuple(self.speedups))

    @property
    def pays(self) -> bool | None:
        """Whether that is worth it; None where the machine was too busy to tell."""
        return None if self.in_turn.is_busy else self.speedup > 1 + _EVEN


class SelfCheck(NamedTuple):
    """What the self-check found."""

    findings: list[Finding]
    pace: Pace | None  # None: something before it failed or took too long, or times were all noise
    left_out: list[str]  # what there was no time for
    compiling: float  # seconds of tracing and compiling, or of loading what was compiled before
    measuring: float  # seconds of all the rest

    @property
    def passed(self) -> bool:
        """Whether everything was exact; slow is no failure."""
        return all(finding.passed for finding in self.findings)


class _Clock:
    """Tells seconds of compiling from all others, and says what goes on."""

    def __init__(self, busy: Busy, budget: float = _BUDGET):
        self.busy, self.budget = busy, budget
        self.began = time.perf_counter()
        self.compiling = 0.0
        self.repetition = 0.0  # seconds that one of the timed repetitions will take

    @contextmanager
    def compile(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with self.busy(f"self-check: compiling {what} (once for this machine)"):
                yield
        finally:
            self.compiling += time.perf_counter() - began

    def is_over(self) -> bool:
        return time.perf_counter() - self.began > self.budget

    def measuring(self) -> float:
        return time.perf_counter() - self.began - self.compiling


def run(pair: Pair, busy: Busy, setting: Setting = SETTING, budget: float = _BUDGET) -> SelfCheck:
    """Checks that speculation changes nothing, then measures what it brings.

    Args:
      pair: target, draft and tokenizer; the command line's is the shipped one.
      busy: called with what is going on, for a spinner.
      setting: prompts, tokens and repetitions, with one draft length.
      budget: seconds after which nothing more is begun. What was left out is said.
    """
    clock = _Clock(busy, budget)
    wide = _in_float32(pair)
    comparison = prepare(wide, setting)
    paces: list[Pace] = []

    def measure() -> str:
        pace = _pace(pair, comparison if wide is pair else prepare(pair, setting), clock)
        if min(pace.step_seconds, pace.round_seconds, pace.round_cost, pace.pass_cost) <= 0:
            return f"times differ so much that they say nothing: {BUSY}"
        paces.append(pace)
        return (
            f"a step {1e3 * pace.step_seconds:.2f} ms, a round {1e3 * pace.round_seconds:.2f} ms; "
            f"{pace.acceptance:.0%} of the drafted tokens accepted\nspeed-ups: {pace.in_turn.range}"
        )

    checks = {
        "greedy speculation against plain decoding, float32": lambda: _same_tokens(wide, comparison, clock),
        "sampled speculation against its exact distribution": lambda: _same_distribution(clock),
        "time of steps and rounds": measure,
    }
    findings, left_out = [], []
    for name, check in checks.items():
        if check is measure and not all(finding.passed for finding in findings):
            break  # the speed of wrong tokens is nobody's concern
        if findings and clock.is_over():
            left_out.append(name)
        else:
            findings.append(_finding(name, check))
    return SelfCheck(findings, paces[0] if paces else None, left_out, clock.compiling, clock.measuring())


def verdict(pace: Pace) -> str:
    """Whether speculation pays, and why not where it does not; one sentence."""
    if pace.in_turn.is_busy:
        return f"{BUSY[0].upper()}{BUSY[1:]}. Speed-ups of {pace.in_turn.range} at K = {pace.draft_len} say nothing."
    times = f"{pace.speedup:.2f} times plain decoding at K = {pace.draft_len}"
    if pace.pays:
        return (
            f"Speculation pays here: {times}. A round brings {pace.tokens_per_round:.1f} tokens and costs "
            f"{pace.round_cost:.1f} steps."
        )
    says = "does not pay" if pace.speedup < 1 - _EVEN else "makes no difference"
    return f"Speculation {says} here: {times}, because {_cause(pace)}."


def _cause(pace: Pace) -> str:
    """The largest of the three factors between K + 1 times plain decoding, the most there is, and what came."""
    width = pace.draft_len + 1
    rest = pace.round_cost / pace.pass_cost
    factors = {
        pace.pass_cost: f"a pass over {width} tokens costs {pace.pass_cost:.1f} passes over one",
        rest: f"drafting and judging make a round {rest:.1f} times as long as its pass over {width} tokens",
        width / pace.tokens_per_round: f"a round brings {pace.tokens_per_round:.1f} tokens of at most {width}",
    }
    return factors[max(factors)]


def _finding(check: str, run: Callable[[], str]) -> Finding:
    began = time.perf_counter()
    try:
        detail, passed = run(), True
    except (AssertionError, RuntimeError, ValueError) as error:  # a device that fails is a finding as well
        detail, passed = str(error) or type(error).__name__, False
    return Finding(check, passed, detail, time.perf_counter() - began)


def _in_float32(pair: Pair) -> Pair:
    """Where nothing may differ: in bfloat16 near-ties may. The pair itself where it is in float32 already."""
    if floating_dtype(pair) == jnp.float32:
        return pair

    def in_float32(loaded):
        return loaded._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), loaded.params))

    return pair._replace(target=in_float32(pair.target), draft=in_float32(pair.draft))


def _same_tokens(pair: Pair, comparison: Comparison, clock: _Clock) -> str:
    with clock.compile("plain decoding and speculation"):
        compile_all(comparison, clock.busy)
    began = time.perf_counter()
    limit = comparison.setting.max_new_tokens
    texts: list[list[list[list[int]]]] = []
    for prompts in comparison.prompts:
        if not texts or not clock.is_over():
            texts.append([run(limit, prompts).new_tokens() for run in comparison.runs.values()])
    clock.repetition = (1 + 1 / SHORTER) * (time.perf_counter() - began) * len(comparison.prompts) / len(texts)
    count = ties = 0
    for prompts, (plain, ours) in zip(comparison.prompts, texts, strict=False):
        for prompt, length, wanted, got in zip(*prompts, plain, ours, strict=True):
            same = next((at for at, both in enumerate(zip(wanted, got, strict=False)) if len({*both}) > 1), len(wanted))
            count += same
            if got != wanted:
                _refuse_unless_tied(pair, [*prompt[:length].tolist(), *wanted[:same]], wanted[same:], got[same:])
                ties += 1
    said = f"{count} tokens of {len(texts) * comparison.setting.batch} texts, all the same"
    return said if ties == 0 else f"{said} up to {ties} near-tie{'s' * (ties > 1)}, where rounding decides"


def _refuse_unless_tied(pair: Pair, text: list[int], wanted: list[int], got: list[int]) -> None:
    """A third pass, over the whole text at once, must find the two next tokens equally likely but for rounding."""
    gap = math.inf
    if wanted and got:
        model, params = pair.target.model, pair.target.params
        tokens = jnp.array([text])
        cache, block = model.init_cache(params, 1, len(text)), model.init_block(params, 1, len(text))
        scores = jax.jit(model.apply)(params, tokens, cache, block).logits[0, -1]
        gap = abs(float(scores[wanted[0]] - scores[got[0]]))
    if not gap <= _TIE:
        raise AssertionError(
            f"after {len(text)} tokens speculation goes on with {got[:3]} and plain decoding with {wanted[:3]}: that "
            f"is no near-tie, their logits differ by {gap:.3g}"
        )


def _same_distribution(clock: _Clock) -> str:
    """A target small enough to enumerate, a draft model that is often wrong, and every text counted."""
    model = testing.table_model(2, 3)
    table = testing.random_table(jax.random.key(11), order=2, vocab_size=3, sharpness=1.5)
    prompts = jnp.tile(jnp.array([_PROMPT]), (_SAMPLES, 1))

    def draw():
        return generate(
            model, table, drafters.draft_model(model), -table, prompts, key=jax.random.key(7), max_new_tokens=_LENGTH,
            sampling=Sampling(1.0), controller=controllers.fixed(DRAFT_LEN),
        ).tokens  # fmt: skip

    with clock.compile("a model small enough to enumerate"):
        probs = testing.exact_sequence_probs(model, table, _PROMPT, _LENGTH, sampling=Sampling(1.0))
        jax.block_until_ready(draw())
    counts = testing.count_sequences(draw(), len(_PROMPT), _LENGTH, 3)
    testing.assert_same_distribution(counts, probs, false_alarm=_FALSE_ALARM)
    return f"{_SAMPLES:,} texts of {_LENGTH} tokens (chi-square, false alarms at most {_FALSE_ALARM:g})"


def _pace(pair: Pair, comparison: Comparison, clock: _Clock) -> Pace:
    target, (draft_len,) = pair.target, comparison.setting.draft_lens
    widths: dict[str, Any] = {"widths": (1, draft_len + 1), "live": comparison.setting.context, "passes": 16}
    with clock.compile("what is timed"):
        compile_all(comparison, clock.busy)
        forward.time_passes(target.model, target.params, **widths, repeats=0)
    most = comparison.setting.repeats
    repeats = min(most, max(_LEAST, int(_SECONDS / clock.repetition)))
    setting = comparison.setting._replace(repeats=repeats)
    timed = time_all(comparison._replace(setting=setting), clock.busy, enough=lambda turns: clock.is_over())
    with clock.busy("measuring single passes"):
        repeats = 1 if clock.is_over() else 5
        one, several = forward.time_passes(target.model, target.params, **widths, repeats=repeats)
    plain, ours = timed[PLAIN], timed[Way(Policy.fixed, draft_len)]
    steps, rounds = ([run.seconds for run in runs] for runs in (plain, ours))
    return Pace(
        draft_len=draft_len,
        step_seconds=statistics.median(steps),
        round_seconds=statistics.median(rounds),
        round_cost=paired_ratio(rounds, steps),
        pass_cost=paired_ratio(several, one),
        tokens_per_round=ours[0].tokens_per_pass,
        acceptance=ours[0].acceptance,
        speedups=list(speedup(plain, ours).turns),
        dtype=str(floating_dtype(pair)),
    )
