"""What `specjax bench` measures: the time of a step and of a round on this machine, beside what the machine allows."""

from __future__ import annotations

import importlib
import inspect
import re
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from specjax import controllers, drafters, limits, stats, text
from specjax.decode import autoregressive, generate
from specjax.limits import Work
from specjax.machine import Machine, this_machine
from specjax.pair import Pair
from specjax.types import Generation, Sampling, Stats

# Real text that every machine has, in a language that the shipped pair knows, and none that it was trained on.
_MODULES = (
    "argparse", "tarfile", "inspect", "subprocess", "pickle", "socket", "zipfile", "doctest", "difflib", "logging",
    "threading", "mailbox",
)  # fmt: skip
SHORTER = 4  # the short generation is a quarter of the long one


Run: TypeAlias = Callable[[int, text.Prompts], Generation]  # (tokens to generate, one batch)


class Setting(NamedTuple):
    """The arguments of one measurement."""

    draft_lens: tuple[int, ...] = (5,)
    batch: int = 1
    prompts: int = 8  # in all; rounded up to whole batches
    context: int = 64  # tokens of each prompt
    max_new_tokens: int = 128
    repeats: int = 5
    temperature: float = 0.0


class Line(NamedTuple):
    """One way to decode."""

    draft_len: int | None  # None is plain decoding
    seconds: float  # of one step or round, less prefill and the call
    tokens_per_pass: float  # emitted by each row in one step or round
    acceptance: float | None  # accepted over drafted tokens
    tokens_per_second: float  # all rows, while all are at work
    speedup: float  # over plain decoding, the median of paired ratios
    call_tokens_per_second: float  # of whole calls, prefill and the wait for the last row included
    call_speedup: float
    work: Work  # of one step or round
    limit_seconds: float  # what the machine needs at least for that work


class Timed(NamedTuple):
    """What one repetition took."""

    seconds: float  # of one step or round
    tokens_per_pass: float
    acceptance: float  # NaN where nothing was drafted
    call_seconds: float  # of the long generation, whole


class Contest(NamedTuple):
    """The ways to decode, and what all of them are given."""

    runs: dict[int | None, Run]  # by draft length; None is plain decoding
    prompts: list[text.Prompts]
    setting: Setting


class Speed(NamedTuple):
    """What was found."""

    lines: list[Line]  # plain decoding first
    setting: Setting
    machine: Machine
    live: float  # mean tokens in the cache of a row while it was measured
    dtype: str


def measure(
    pair: Pair, setting: Setting, busy: Callable[[str], AbstractContextManager[Any]], machine: Machine | None = None
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

    Raises:
      ValueError: max_new_tokens below 4 * (K + 1): too few rounds to tell them from the rest.
    """
    contest = prepare(pair, setting)
    setting = contest.setting
    dtype = floating_dtype(pair)
    compile_all(contest, busy)
    with busy("what this machine can do"):
        machine = machine or this_machine(dtype)
    timed = time_all(contest, busy)
    live = setting.context + (1 + 1 / SHORTER) * setting.max_new_tokens / 2
    with busy("counting bytes and operations"):
        lines = [_line(pair, setting, machine, live, draft_len, timed) for draft_len in contest.runs]
    return Speed(lines, setting, machine, live, str(dtype))


def prepare(pair: Pair, setting: Setting) -> Contest:
    """Prompts, and plain decoding and speculation for each K; nothing is compiled yet. Errors as for `measure`."""
    least = SHORTER * (max(setting.draft_lens) + 1)
    if setting.max_new_tokens < least:
        raise ValueError(
            f"max_new_tokens must be at least {least} to measure rounds of K = {max(setting.draft_lens)}, "
            f"got {setting.max_new_tokens}."
        )
    setting = setting._replace(prompts=-(-setting.prompts // setting.batch) * setting.batch)
    runs: dict[int | None, Run] = {None: _plain(pair, setting)}
    runs |= {draft_len: _speculative(pair, setting, draft_len) for draft_len in setting.draft_lens}
    return Contest(runs, _prompts(pair, setting), setting)


def compile_all(contest: Contest, busy: Callable[[str], AbstractContextManager[Any]]) -> None:
    """Compiles every way to decode."""
    for draft_len, run in contest.runs.items():
        with busy("compiling plain decoding" if draft_len is None else f"compiling speculation, K = {draft_len}"):
            jax.block_until_ready(run(1, contest.prompts[0]))


def time_all(contest: Contest, busy: Callable[[str], AbstractContextManager[Any]]) -> dict[int | None, list[Timed]]:
    """Every way to decode in turn, `setting.repeats` times."""
    setting = contest.setting
    timed: dict[int | None, list[Timed]] = {draft_len: [] for draft_len in contest.runs}
    for repeat in range(setting.repeats):
        for draft_len, run in contest.runs.items():
            with busy(f"measuring, {repeat + 1} of {setting.repeats}"):
                timed[draft_len].append(time_generations(run, contest.prompts, setting.max_new_tokens))
    return timed


def paired_ratio(above: list[Timed], below: list[Timed]) -> float:
    """Seconds of a step or round over those of another, each pair measured one after the other: the median."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(above, below, strict=True))


def time_generations(run: Run, batches: list[text.Prompts], max_new_tokens: int) -> Timed:
    """One repetition: all batches to a quarter of `max_new_tokens`, then to all of it.

    Args:
      run: (tokens to generate, one batch) -> Generation; the number must not be part of the compiled program, which
        has been compiled.
      batches: the prompts.

    Raises:
      ValueError: no more passes for the longer ones than for the shorter.
    """
    times, passes, counts = [], [], []
    for limit in (max_new_tokens // SHORTER, max_new_tokens):
        start = time.perf_counter()
        parts = [jax.block_until_ready(run(limit, batch)).stats for batch in batches]
        times.append(time.perf_counter() - start)
        passes.append(sum(int(part.rounds.max()) for part in parts))  # a loop goes on until its last row ends
        counts.append(Stats(*(np.concatenate(rows) for rows in zip(*parts, strict=True))))  # type: ignore[arg-type]
    if passes[1] <= passes[0]:
        raise ValueError("the rows ended before a round could be measured: are the parameters finite?")
    between = Stats(*(long - short for short, long in zip(*counts, strict=True)))
    return Timed(
        (times[1] - times[0]) / (passes[1] - passes[0]),
        stats.tokens_per_round(between),
        stats.acceptance_rate(between),
        times[1],
    )


def _line(
    pair: Pair,
    setting: Setting,
    machine: Machine,
    live: float,
    draft_len: int | None,
    timed: dict[int | None, list[Timed]],
) -> Line:
    target, draft = pair.target, pair.draft
    own, plain = timed[draft_len], timed[None]
    if draft_len is None:
        passes = limits.step(target.model, target.params, batch=setting.batch, live=live)
    else:
        passes = limits.speculation(
            target.model, target.params, draft.model, draft.params, batch=setting.batch, live=live, draft_len=draft_len
        )
    middle = statistics.median(x.seconds for x in own)
    call = statistics.median(x.call_seconds for x in own)
    per_pass = own[0].tokens_per_pass  # the same in every repetition: so are the keys
    return Line(
        draft_len=draft_len,
        seconds=middle,
        tokens_per_pass=per_pass,
        acceptance=None if draft_len is None else own[0].acceptance,
        tokens_per_second=setting.batch * per_pass / middle,
        speedup=per_pass * paired_ratio(plain, own),
        call_tokens_per_second=setting.prompts * setting.max_new_tokens / call,
        call_speedup=statistics.median(a.call_seconds / b.call_seconds for a, b in zip(plain, own, strict=True)),
        work=limits.total(passes),
        limit_seconds=limits.seconds(passes, machine),
    )


def _plain(pair: Pair, setting: Setting) -> Run:
    target = pair.target

    def run(limit: int, prompts: text.Prompts) -> Generation:
        return autoregressive(target.model, target.params, *prompts, **_options(setting, limit))

    return run


def _speculative(pair: Pair, setting: Setting, draft_len: int) -> Run:
    target, draft = pair.target, pair.draft
    drafter, controller = drafters.draft_model(draft.model), controllers.fixed(draft_len)

    def run(limit: int, prompts: text.Prompts) -> Generation:
        return generate(
            target.model, target.params, drafter, draft.params, *prompts, controller=controller,
            **_options(setting, limit),
        )  # fmt: skip

    return run


def _options(setting: Setting, limit: int) -> dict[str, Any]:
    """The limit is data, not part of the program: both lengths run the same one."""
    return {
        "max_new_tokens": np.full((setting.batch,), limit, np.int32),
        "capacity": setting.context + setting.max_new_tokens,
        "sampling": Sampling(setting.temperature),
    }


def _prompts(pair: Pair, setting: Setting) -> list[text.Prompts]:
    tokens = np.zeros((setting.prompts, setting.context), np.int32)
    for row in range(setting.prompts):
        first, further = row % len(_MODULES), row // len(_MODULES)
        names = _MODULES[first:] + _MODULES[:first]
        source = "".join(inspect.getsource(importlib.import_module(name)) for name in names)
        # From a definition on: a file's opening is a licence in prose. Rows past the modules begin at later ones.
        starts = [match.start() for match in re.finditer(r"^(def|class) ", source, re.MULTILINE)]
        opening = source[starts[further] :][: 16 * setting.context]  # no tokenizer makes less of it
        ids = pair.tokenizer.encode(opening).ids
        if len(ids) < setting.context:
            raise ValueError(f"--context {setting.context}: the prompts at hand have {len(ids)} tokens at most.")
        tokens[row] = ids[: setting.context]
    lengths = np.full((setting.batch,), setting.context, np.int32)
    return [text.Prompts(batch, lengths) for batch in np.split(tokens, setting.prompts // setting.batch)]


def floating_dtype(pair: Pair) -> Any:
    """What the target computes in: the dtype of most of its floating-point parameters."""
    sizes: dict[Any, int] = {}
    for leaf in jax.tree.leaves(pair.target.params):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.size
    return jnp.dtype(max(sizes, key=sizes.__getitem__))
