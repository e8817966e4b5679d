"""Adaptive speculation against every fixed draft length and plain decoding: on a good draft, and on bad ones.

    python benchmarks/adaptive.py --batch 1 --batch 4 --batch 16

One run, the same prompts and target for all. The draft is the shipped one; one of random weights; the shipped one that
turns useless half-way through every text ("collapse"), or is useless up to there ("rise"); and the target itself, right
and slow. Repetitions are paired: each runs every contender once, in turn, and every other one backwards; plain
decoding, the best fixed length and `throughput` go on to more of them, as a few percent are at stake. Times are of the
rounds alone: a run to one token, which reads the prompts, is taken off. `throughput` goes on from what it learnt in the
run before; "from nothing" starts every batch anew. On a shared machine neighbours come and go, and rounds get cheaper
and dearer, so profiles are taken in turn with the contenders, one every sixth repetition, and `throughput` decides by
the latest. Speed-ups are predicted twice: by the first of them, and by their median.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from prompts import code_prompts
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import specjax
from specjax import controllers, models, stats, text
from specjax.costs import Profile
from specjax.types import Controller, Generation, Model, PyTree

CONTEXT = 64
NEVER = 2**30
PROFILED = 6  # repetitions from one profile to the next


class Pair(NamedTuple):
    """A draft for the shipped target."""

    name: str
    model: Model
    params: PyTree  # (parameters, first useless position, first useful one)


class Way(NamedTuple):
    """A way to decode one batch: (limit, prompts, controller state) -> Generation."""

    name: str
    run: Callable[[int, text.Prompts, PyTree], Generation]
    carries: bool = False  # whether the controller's state goes from batch to batch
    adapts: bool = False  # whether it is what this is all about


class Line(NamedTuple):
    """One contender on one pair and batch size."""

    pair: str
    batch: int
    name: str
    tokens_per_second: float
    speedup: float  # over plain decoding, the median of paired ratios
    over_best: float | None  # seconds over those of the best fixed draft length, the median of paired ratios
    tokens_per_round: float
    predicted: list[float]  # speed-up by the profile taken before, and by the one in turn; of `throughput` alone
    draft_lengths: list[int]  # rounds of the last repetition that drafted 0, 1, ... tokens
    repeats: int  # that the medians are of


def main(
    batch: Annotated[list[int], typer.Option(help="rows at once; may be given several times")] = [1, 4, 16],  # noqa: B006
    draft_len: Annotated[list[int], typer.Option(help="the fixed K of the sweep")] = [1, 2, 3, 4, 5, 6, 8],  # noqa: B006
    pair: Annotated[list[str], typer.Option(help="shipped, random, collapse, rise, slow; default all")] = [],  # noqa: B006
    num_prompts: int = 16,
    max_new_tokens: int = 128,
    repeats: Annotated[int, typer.Option(help="paired repetitions; medians are reported")] = 5,
    finals: Annotated[int, typer.Option(help="more of them, of plain, the best fixed length and throughput")] = 12,
    temperature: float = 0.0,
    longest: Annotated[int, typer.Option(help="K of the adaptive controllers")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
) -> None:
    """Measures and prints a table for each pair and batch size."""
    target = models.load(models.PRETRAINED / "target", dtype=jnp.float32)
    draft = models.load(models.PRETRAINED / "draft", dtype=jnp.float32)
    tokenizer = Tokenizer.from_file(str(models.PRETRAINED / "target/tokenizer.json"))
    prompts = code_prompts(tokenizer, num_prompts, shortest=CONTEXT, longest=CONTEXT)
    pairs = _pairs(target, draft, CONTEXT + max_new_tokens // 2)
    wanted = pair or [each.name for each in pairs]
    sampling = specjax.Sampling(temperature)
    console = Console(width=140)
    lines: list[Line] = []
    for rows in batch:
        batches = [
            text.Prompts(prompts.tokens[at : at + rows], prompts.lengths[at : at + rows])
            for at in range(0, num_prompts - rows + 1, rows)
        ]
        alike = itertools.groupby((each for each in pairs if each.name in wanted), lambda each: each.model)
        for model, group in ((model, list(group)) for model, group in alike):  # one program, and one profile
            drafter = specjax.drafters.draft_model(model)
            measure = functools.partial(
                specjax.profile, target.model, target.params, drafter, group[0].params, batch_sizes=(rows,),
                contexts=(CONTEXT, CONTEXT + max_new_tokens), longest=longest, sampling=sampling,
            )  # fmt: skip
            cases = [
                _Case(
                    functools.partial(_ways, target, each, drafter, draft_len, longest, rows, max_new_tokens, sampling),
                    batches,
                )
                for each in group
            ]
            profiles = _measure(cases, max_new_tokens, repeats, finals, measure)
            for each, case in zip(group, cases, strict=True):
                found = _lines(each.name, rows, case, [profiles[0], _median(profiles)])
                lines += found
                _show(console, found, [profiles[0], _median(profiles)])
                if each.name in ("collapse", "rise"):
                    _show_shift(console, target, each, drafter, profiles[-1], batches, max_new_tokens, sampling)
            if json_file is not None:  # after each group: the next one may take an hour
                said = {"device": jax.devices()[0].device_kind, "repeats": repeats, "finals": finals}
                said["max_new_tokens"] = max_new_tokens
                json_file.write_text(json.dumps({**said, "lines": [line._asdict() for line in lines]}, indent=1) + "\n")
            jax.clear_caches()  # a program for each profile: together with the next group's they fill the memory


def _pairs(target: Any, draft: Any, middle: int) -> list[Pair]:
    turning = _turning(draft.model)
    rest = jnp.int32(NEVER)
    noise = models.random(draft.config, jax.random.key(7), dtype=jnp.float32)
    return [
        Pair("shipped", turning, (draft.params, rest, jnp.int32(0))),
        Pair("random", turning, (noise.params, rest, jnp.int32(0))),
        Pair("collapse", turning, (draft.params, jnp.int32(middle), jnp.int32(0))),
        Pair("rise", turning, (draft.params, rest, jnp.int32(middle))),
        Pair("slow", target.model, target.params),
    ]


def _turning(model: Model) -> Model:
    """The model, useless outside of some positions: there it turns its vocabulary round. One program for all drafts."""

    def apply(params, tokens, cache, block, **options):
        inner, until, since = params
        position = cache.lengths[:, None] + block.filled + jnp.arange(tokens.shape[1])[None]
        out = model.apply(inner, tokens, cache, block, **options)
        at = options.get("logits_at")
        position = position if at is None else jnp.take_along_axis(position, at, 1)
        good = (position >= since) & (position < until)
        return out._replace(logits=jnp.where(good[..., None], out.logits, out.logits[..., ::-1]))

    return model._replace(
        apply=apply,
        init_cache=lambda params, batch, slots: model.init_cache(params[0], batch, slots),
        init_block=lambda params, batch, size: model.init_block(params[0], batch, size),
    )


def _ways(
    target, each: Pair, drafter, swept: list[int], longest: int, rows: int, most: int, sampling, profile: Profile
) -> list[Way]:
    options = {"capacity": CONTEXT + most, "sampling": sampling}

    def plain(limit: int, prompts: text.Prompts, state: PyTree) -> Generation:
        del state
        limits = np.full((rows,), limit, np.int32)
        return specjax.autoregressive(target.model, target.params, *prompts, max_new_tokens=limits, **options)

    def by(controller: Controller) -> Callable[[int, text.Prompts, PyTree], Generation]:
        def run(limit: int, prompts: text.Prompts, state: PyTree) -> Generation:
            return specjax.generate(
                target.model, target.params, drafter, each.params, *prompts, controller=controller,
                controller_state=state, max_new_tokens=np.full((rows,), limit, np.int32), **options,
            )  # fmt: skip

        return run

    adaptive = by(controllers.throughput(profile))
    others = [
        Way("additive", by(controllers.additive(longest)), carries=True),
        Way("confidence(0.4)", by(controllers.confidence(0.4, longest))),
    ]
    return [
        Way("plain decoding", plain),
        *(Way(f"fixed({size})", by(controllers.fixed(size))) for size in swept),
        Way("throughput", adaptive, carries=True, adapts=True),
        Way("throughput, from nothing", adaptive, adapts=True),
        *(others if each.name == "shipped" else ()),
    ]


class _Case:
    """The contenders on one pair, and what they took and gave."""

    def __init__(self, ways_by: Callable[[Profile], list[Way]], batches: list[text.Prompts]):
        self.ways_by, self.batches = ways_by, batches
        self.states: dict[str, PyTree] = {}
        self.last: dict[str, list[Generation]] = {}  # of each contender's last repetition, a batch each
        self.times: dict[str, list[float]] = {}  # seconds, a repetition each
        self.best = ""  # the fastest of plain decoding and the fixed draft lengths

    def seconds(self, way: Way, limit: int) -> float:
        begin = time.perf_counter()
        self.last[way.name] = []
        for prompts in self.batches:
            out = jax.block_until_ready(way.run(limit, prompts, self.states.get(way.name)))
            self.last[way.name].append(out)
            if way.carries and limit > 1:
                self.states[way.name] = out.controller_state
        return time.perf_counter() - begin

    def run(self, ways: list[Way], most: int) -> None:
        """A repetition, around a ring: who ran just before moves a time by a few percent, so nobody follows himself."""
        self.seconds(ways[-1], most)
        for way in ways:
            prefill = self.seconds(way, 1)
            self.times.setdefault(way.name, []).append(self.seconds(way, most) - prefill)

    def choose(self) -> None:
        simple = [name for name in self.times if name.startswith(("plain", "fixed"))]
        self.best = min(simple, key=lambda name: statistics.median(self.times[name]))


def _measure(
    cases: list[_Case], most: int, repeats: int, finals: int, profiled: Callable[..., Profile]
) -> list[Profile]:
    """Runs them all; the profiles that `throughput` decided by."""
    profiles: list[Profile] = []

    def run_in_turn(count: int, wanted: Callable[[_Case, Way], bool]) -> None:
        for turn in range(count):
            if turn % PROFILED == 0:
                profiles.append(profiled(repeats=3) if profiles else profiled())
            for case in cases:
                ways = [way for way in case.ways_by(profiles[-1]) if wanted(case, way)]
                if turn % PROFILED == 0:
                    for way in (way for way in ways if way.adapts or not case.times):
                        # Compiles, without what is learnt and with it: what is carried has seen every prompt twice. And
                        # the first run of a program's rounds takes half a second longer.
                        for _ in range(2):
                            case.seconds(way, most)
                case.run(ways[:: -1 if turn % 2 else 1], most)

    run_in_turn(repeats, lambda case, way: True)
    for case in cases:
        case.choose()
    run_in_turn(finals, lambda case, way: way.adapts or way.name in ("plain decoding", case.best))
    return profiles


def _median(profiles: list[Profile]) -> Profile:
    """Of each time."""
    return profiles[0]._replace(
        costs=jax.tree.map(lambda *times: statistics.median(times), *(each.costs for each in profiles))
    )


def _middle(profile: Profile) -> float:
    """Tokens in the cache, on the way from the shortest text to the longest."""
    return statistics.mean(profile.contexts())


def _lines(name: str, rows: int, case: _Case, profiles: list[Profile]) -> list[Line]:
    times, results, best = case.times, case.last, case.best
    wanted = [row for out in results["plain decoding"] for row in out.new_tokens()]
    lines = []
    for way in case.ways_by(profiles[0]):
        outs, own = results[way.name], times[way.name]
        plain, winner = (times[other][: len(own)] for other in ("plain decoding", best))
        same = [row for out in outs for row in out.new_tokens()] == wanted
        parts = [jax.device_get(out.stats) for out in outs]
        emitted, rounds = (sum(int(getattr(part, field).sum()) for part in parts) for field in ("emitted", "rounds"))
        lengths = np.sum([stats.draft_lengths(part) for part in parts], 0) if way.name != "plain decoding" else []
        predictors = profiles if way.adapts else []
        predicted = [stats.profiled_speedup(*parts, profile=each, context=_middle(each)) for each in predictors]
        lines.append(
            Line(
                pair=name,
                batch=rows,
                name=f"{way.name}{' (best)' * (way.name == best)}{'' if same else ' (other tokens)'}",
                tokens_per_second=emitted / statistics.median(own),
                speedup=statistics.median(a / b for a, b in zip(plain, own, strict=True)),
                over_best=statistics.median(b / a for a, b in zip(winner, own, strict=True)),
                tokens_per_round=emitted / rounds,
                predicted=predicted,
                draft_lengths=[int(count) for count in lengths],
                repeats=len(own),
            )
        )
    return lines


def _show(console: Console, lines: list[Line], profiles: list[Profile]) -> None:
    caption = []
    for profile, when in zip(profiles, ("before", "in turn"), strict=True):
        costs = profile.at(lines[0].batch, _middle(profile))
        rounds, late = ", ".join(f"{steps:.2f}" for steps in costs.in_steps()), costs.change / costs.plain
        caption.append(
            f"{when}: rounds of K = 0, 1, ... in plain steps of {1e3 * costs.plain:.2f} ms: {rounds}; "
            f"after a break {late:.2f} more"
        )
    table = Table(title=f"{lines[0].pair} draft, batch {lines[0].batch}", caption="\n".join(caption))
    for column in ("", "runs", "tokens/s", "speed-up", "seconds / best", "tokens/round", "predicted", "rounds by K"):
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        over = "" if line.over_best is None else f"{line.over_best:.3f}"
        predicted = ", ".join(f"{speedup:.2f}" for speedup in line.predicted)
        numbers = (f"{line.tokens_per_second:.0f}", f"{line.speedup:.2f}", over, f"{line.tokens_per_round:.2f}")
        lengths = " ".join(map(str, line.draft_lengths))
        table.add_row(line.name, str(line.repeats), *numbers, predicted, lengths)
    console.print(table)


def _show_shift(console: Console, target, each: Pair, drafter, profile: Profile, batches, most: int, sampling) -> None:
    """The draft length of the batch, round by round, around the middle of the text."""
    state, told = None, []
    for prompts in batches:
        chunks = specjax.stream(
            target.model, target.params, drafter, each.params, *prompts, controller=controllers.throughput(profile),
            controller_state=state, max_new_tokens=most, capacity=CONTEXT + most, sampling=sampling,
        )  # fmt: skip
        done, rounds = 1.0, []
        for chunk in list(chunks)[1:]:
            lengths = [len(row[0].tokens) for row in chunk.rounds if row]
            rounds.append((done, max(lengths, default=0)))
            done += statistics.mean(row[0].num_emitted for row in chunk.rounds if row)
        after = [size for at, size in rounds if at >= most / 2]
        before = [size for at, size in rounds if at < most / 2]
        told.append((before, after))
    console.print(f"{each.name}: draft lengths of the last rounds before the middle of the text | of those after it")
    for before, after in told[:4]:
        console.print(f"  {' '.join(map(str, before[-10:]))} | {' '.join(map(str, after[:30]))}")


if __name__ == "__main__":
    typer.run(main)
