"""What a round without a draft costs, in plain decoding steps: the floor under adaptive speculation.

    python benchmarks/idle.py --batch 1 --batch 4 --batch 16

Nothing is ever drafted, by a controller that cannot and by `throughput` after it learnt that drafts are wrong, with
exploration off. Runs are paired, in all orders; times are of the rounds alone: a run to one token, which reads the
prompts, is off.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from prompts import code_prompts
from tokenizers import Tokenizer

import specjax
from specjax import controllers, models, stats
from specjax.costs import Costs, Profile
from specjax.types import Controller, Generation, PyTree

CONTEXT, BUCKETS = 64, (0, 1, 2, 3, 5, 8)
# Of some machine on which drafts could pay; else `throughput` does not even look.
ROUNDS = (1.0, 1.7, 1.9, 2.2, 2.9, 3.0, 3.7, 3.8, 3.9)


def main(
    batch: Annotated[list[int], typer.Option(help="rows at once; may be given several times")] = [1, 4, 16],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="paired runs; medians are reported")] = 15,
    max_new_tokens: int = 128,
) -> None:
    """Prints a line for each batch size and controller."""
    target = models.load(models.PRETRAINED / "target", dtype=jnp.float32)
    draft = models.load(models.PRETRAINED / "draft", dtype=jnp.float32)
    tokenizer = Tokenizer.from_file(str(models.PRETRAINED / "target/tokenizer.json"))
    for rows in batch:
        prompts = code_prompts(tokenizer, rows, shortest=CONTEXT, longest=CONTEXT)
        _measure(target, draft, prompts, rows, repeats, max_new_tokens)


def _measure(target, draft, prompts, rows: int, repeats: int, most: int) -> None:
    drafter, capacity = specjax.drafters.draft_model(draft.model), CONTEXT + most

    def plain(limit: int) -> Generation:
        return specjax.autoregressive(target.model, target.params, *prompts, max_new_tokens=limit, capacity=capacity)

    def by(controller: Controller, learnt: PyTree) -> Callable[[int], Generation]:
        return lambda limit: specjax.generate(
            target.model, target.params, drafter, draft.params, *prompts, controller=controller,
            controller_state=learnt, max_new_tokens=limit, capacity=capacity,
        )  # fmt: skip

    adaptive = controllers.throughput(_profile(rows), exploration=0.0)
    learnt = adaptive.init(rows)
    learnt = learnt._replace(usual=learnt.usual.at[0].add(20.0))  # rounds of the most hopeless kind
    ways = {"plain": plain, "never drafts": by(_never(), None), "throughput": by(adaptive, learnt)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, run in ways.items():
        for limit in (1, most, most):
            out = jax.block_until_ready(run(limit))
        drafted = 0 if name == "plain" else int(stats.draft_lengths(jax.device_get(out.stats))[1:].sum())
        if drafted:
            raise RuntimeError(f"{name} drafted in {drafted} rounds: this measures rounds without a draft.")
    # In all orders: which program ran before moves a time by a few percent.
    for order in itertools.islice(itertools.cycle(itertools.permutations(ways.items())), repeats):
        for name, run in order:
            times[name].append(_seconds(run, most) - _seconds(run, 1))
    for name in list(ways)[1:]:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        step = 1e3 * statistics.median(times["plain"]) / (most - 1)
        print(f"{rows} rows, {name}: {ratio:.3f} plain steps of {step:.2f} ms")


def _never() -> Controller:
    def none(batch: int) -> jax.Array:
        return jnp.zeros((batch,), jnp.int32)

    return Controller(none, lambda state, rows: state, lambda state, info: state, BUCKETS)


def _profile(rows: int) -> Profile:
    drafts = tuple(0.1 * np.arange(len(ROUNDS)))
    return Profile(jax.devices()[0].device_kind, BUCKETS, (Costs(rows, CONTEXT, 1.0, ROUNDS, drafts, (0.2, 0.015)),))


def _seconds(run: Callable[[int], Generation], limit: int) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(limit))
    return time.perf_counter() - begin


if __name__ == "__main__":
    typer.run(main)
