"""Ways to decode, compared on the same prompts, in turn: what `specjax bench` and `specjax doctor` time."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from specjax import controllers, drafters, stats, text, verify
from specjax.cli.choose_controller import Policy, choose
from specjax.cli.load_pair import Pair
from specjax.costs import Profile
from specjax.decode.api import autoregressive, generate
from specjax.profiling.paired_timing import in_turn
from specjax.stats import SpeedUp, speedup_in_turn
from specjax.types import Controller, Generation, Sampling, Stats

# Real text that every machine has, in a language that the shipped pair knows, and none that it was trained on.
_MODULES = (
    "argparse", "tarfile", "inspect", "subprocess", "pickle", "socket", "zipfile", "doctest", "difflib", "logging",
    "threading", "mailbox",
)  # fmt: skip
SHORTER = 4  # the short generation is a quarter of the long one


class Way(NamedTuple):
    """A way to decode."""

    policy: Policy | None  # None is plain decoding
    draft_len: int  # K, the most that is drafted

    @property
    def adapts(self) -> bool:
        """Whether the draft length changes from round to round."""
        return self.policy not in (None, Policy.fixed)

    def __str__(self) -> str:
        if self.policy is None:
            return "plain decoding"
        return f"{self.policy}, K <= {self.draft_len}" if self.adapts else f"K = {self.draft_len}"


PLAIN = Way(None, 0)
Run: TypeAlias = Callable[[int, text.Prompts], Generation]  # (tokens to generate, one batch)


class Setting(NamedTuple):
    """The arguments of one measurement."""

    draft_lens: tuple[int, ...] = (5,)
    controllers: tuple[Policy, ...] = ()  # beside the fixed draft lengths, with K the longest of those
    batch: int = 1
    prompts: int = 8  # in all; rounded up to whole batches
    context: int = 64  # tokens of each prompt
    max_new_tokens: int = 128
    repeats: int = 5
    temperature: float = 0.0


class Timed(NamedTuple):
    """What one repetition took."""

    seconds: float  # of one step or round
    tokens_per_pass: float
    acceptance: float  # NaN where nothing was drafted
    call_seconds: float  # of the long generation, whole
    between: tuple[Stats, ...]  # counts of what was measured, by batch of prompts
    whole: tuple[Stats, ...]  # of the long generation


class Comparison(NamedTuple):
    """The ways to decode, and what all of them are given."""

    runs: dict[Way, Run]
    prompts: list[text.Prompts]
    setting: Setting
    profiles: dict[Way, Profile]  # that adaptive controllers decide by
    learn: dict[Way, Callable[[], None]]  # what they do before they are measured


def prepare(
    pair: Pair,
    setting: Setting,
    busy: Callable[[str], AbstractContextManager[Any]] | None = None,
    kept_in: Path | None = None,
) -> Comparison:
    """Prompts, and plain decoding and speculation of each kind; only what needs a profile is compiled and measured.
    Errors as for `measure`."""
    least = SHORTER * (max(setting.draft_lens) + 1)
    if setting.max_new_tokens < least:
        raise ValueError(
            f"max_new_tokens must be at least {least} to measure rounds of K = {max(setting.draft_lens)}, "
            f"got {setting.max_new_tokens}."
        )
    setting = setting._replace(prompts=-(-setting.prompts // setting.batch) * setting.batch)
    longest = max(setting.draft_lens)
    runs: dict[Way, Run] = {PLAIN: _plain(pair, setting)}
    for draft_len in setting.draft_lens:
        runs[Way(Policy.fixed, draft_len)] = _speculative(pair, setting, controllers.fixed(draft_len))
    prompts = _prompts(pair, setting)
    profiles: dict[Way, Profile] = {}
    learn: dict[Way, Callable[[], None]] = {}
    for policy in setting.controllers:
        chosen = choose(
            policy, pair, longest, batch=setting.batch, context=setting.context + setting.max_new_tokens // 2,
            sampling=Sampling(setting.temperature), verifier=verify.rejection(), kept_in=kept_in,
            busy=busy or (lambda what: nullcontext()),
        )  # fmt: skip
        way = Way(policy, longest)
        runs[way], learn[way] = _adaptive(pair, setting, chosen.controller, prompts)
        if chosen.profile is not None:
            profiles[way] = chosen.profile
    return Comparison(runs, prompts, setting, profiles, learn)


def compile_all(comparison: Comparison, busy: Callable[[str], AbstractContextManager[Any]]) -> None:
    """Compiles every way to decode; adaptive controllers see all prompts once."""
    for way, run in comparison.runs.items():
        with busy(f"compiling {way}"):
            jax.block_until_ready(run(1, comparison.prompts[0]))
            if way in comparison.learn:
                comparison.learn[way]()
                jax.block_until_ready(run(1, comparison.prompts[0]))  # another program: it is given a state


def time_all(
    comparison: Comparison,
    busy: Callable[[str], AbstractContextManager[Any]],
    enough: Callable[[int], bool] = lambda turns: False,
) -> dict[Way, list[Timed]]:
    """Every way to decode in turn, `setting.repeats` times, or until `enough` turns are done, but once at least."""
    setting = comparison.setting
    jobs = {
        way: functools.partial(time_generations, run, comparison.prompts, setting.max_new_tokens)
        for way, run in comparison.runs.items()
    }
    return in_turn(
        jobs, setting.repeats, enough=enough, around=lambda turn: busy(f"measuring, {turn} of {setting.repeats}")
    )


def speedup(plain: list[Timed], ours: list[Timed]) -> SpeedUp:
    """Of rounds over steps, turn by turn."""
    steps, rounds = ([run.seconds for run in runs] for runs in (plain, ours))
    return speedup_in_turn(steps, rounds, tokens=ours[0].tokens_per_pass)  # the same in every turn: so are the keys


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
        counts.append([jax.device_get(part) for part in parts])
    if passes[1] <= passes[0]:
        raise ValueError("the rows ended before a round could be measured: are the parameters finite?")
    between = tuple(jax.tree.map(lambda short, long: long - short, *pair) for pair in zip(*counts, strict=True))
    whole = together(between)
    return Timed(
        (times[1] - times[0]) / (passes[1] - passes[0]),
        stats.tokens_per_round(whole),
        stats.acceptance_rate(whole),
        times[1],
        between,
        tuple(counts[1]),
    )


def together(parts: Sequence[Stats]) -> Stats:
    """The counts of several batches as of one."""
    return Stats(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))  # type: ignore[arg-type]


def _plain(pair: Pair, setting: Setting) -> Run:
    target = pair.target

    def run(limit: int, prompts: text.Prompts) -> Generation:
        return autoregressive(target.model, target.params, *prompts, **_options(setting, limit))

    return run


def _speculative(pair: Pair, setting: Setting, controller: Controller, state: Any = None) -> Run:
    target, draft = pair.target, pair.draft
    drafter = drafters.draft_model(draft.model)

    def run(limit: int, prompts: text.Prompts) -> Generation:
        return generate(
            target.model, target.params, drafter, draft.params, *prompts, controller=controller,
            controller_state=state, **_options(setting, limit),
        )  # fmt: skip

    return run


def _adaptive(
    pair: Pair, setting: Setting, controller: Controller, prompts: list[text.Prompts]
) -> tuple[Run, Callable[[], None]]:
    """A run that starts from what was learnt, always from the same; and how it is learnt, from all prompts in turn."""
    state: Any = None

    def run(limit: int, batch: text.Prompts) -> Generation:
        return _speculative(pair, setting, controller, state)(limit, batch)

    def learn() -> None:
        nonlocal state
        for batch in prompts:
            state = run(setting.max_new_tokens, batch).controller_state

    return run, learn


def _options(setting: Setting, limit: int) -> dict[str, Any]:
    """The limit is data, not part of the program: both lengths run the same one."""
    return {
        "max_new_tokens": np.full((setting.batch,), limit, np.int32),
        "capacity": setting.context + setting.max_new_tokens,
        "sampling": Sampling(setting.temperature),
    }


def _prompts(pair: Pair, setting: Setting) -> list[text.Prompts]:
    rows: list[list[int]] = []
    sources = [_source(first) for first in range(min(len(_MODULES), setting.prompts))]
    for row in range(setting.prompts):
        first, further = row % len(_MODULES), row // len(_MODULES)
        source, starts = sources[first]
        if further >= len(starts):
            raise ValueError(f"{setting.prompts} prompts are asked for: {row} are at hand. Lower --prompts or --batch.")
        opening = source[starts[further] :][: 16 * setting.context]  # no tokenizer makes less of it
        ids = pair.tokenizer.encode(opening).ids
        if len(ids) < setting.context:
            raise ValueError(f"--context {setting.context}: the prompts at hand have {len(ids)} tokens at most.")
        rows.append(ids[: setting.context])
    lengths = np.full((setting.batch,), setting.context, np.int32)
    return [
        text.Prompts(batch, lengths) for batch in np.split(np.array(rows, np.int32), setting.prompts // setting.batch)
    ]


def _source(first: int) -> tuple[str, list[int]]:
    """All modules, beginning with that one, and where prompts begin: at a definition, as a file's opening is a licence
    in prose. Rows past the modules begin at later ones."""
    names = _MODULES[first:] + _MODULES[:first]
    source = "".join(inspect.getsource(importlib.import_module(name)) for name in names)
    return source, [match.start() for match in re.finditer(r"^(def|class) ", source, re.MULTILINE)]
