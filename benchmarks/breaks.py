"""What it costs to go from plain steps to drafts and back, in plain decoding steps.

    python benchmarks/breaks.py --batch 1 --repeats 11

Controllers that follow a plan, one program for all plans: always the same, then so many rounds without a draft and so
many with one. What a mixed plan takes longer than its rounds take in generations that have no others is divided by the
number of times that drafts began again. Runs are paired; times are of the rounds alone: a run to one token is off.
"""

from __future__ import annotations

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
from specjax import models, text
from specjax.types import Controller, Generation, PyTree

CONTEXT, MOST, PERIOD = 64, 128, 63  # rounds of the longest plan
BUCKETS = (0, 1, 2, 3, 5, 8)
ALWAYS = {0: [0], 1: [1], 5: [5]}
MIXED = {
    "1 without, 1 of 5": [0, 5],
    "8 without, 1 of 1": [0] * 8 + [1],
    "8 without, 4 of 1": [0] * 8 + [1] * 4,
    "8 without, 1 of 5": [0] * 8 + [5],
    "8 without, 4 of 5": [0] * 8 + [5] * 4,
    "8 without, 16 of 5": [0] * 8 + [5] * 16,
    "62 without, 1 of 1": [0] * 62 + [1],
}


def main(
    batch: Annotated[list[int], typer.Option(help="rows at once; may be given several times")] = [1],  # noqa: B006
    num_batches: int = 8,
    repeats: Annotated[int, typer.Option(help="paired runs; medians are reported")] = 11,
) -> None:
    """Prints a line for each plan."""
    target = models.load(models.PRETRAINED / "target", dtype=jnp.float32)
    draft = models.load(models.PRETRAINED / "draft", dtype=jnp.float32)
    tokenizer = Tokenizer.from_file(str(models.PRETRAINED / "target/tokenizer.json"))
    drafter = specjax.drafters.draft_model(draft.model)
    for rows in batch:
        prompts = code_prompts(tokenizer, rows * num_batches, shortest=CONTEXT, longest=CONTEXT)
        batches = [
            text.Prompts(prompts.tokens[at : at + rows], prompts.lengths[at : at + rows])
            for at in range(0, rows * num_batches, rows)
        ]

        def plain(limit: int, some: text.Prompts) -> Generation:
            return specjax.autoregressive(
                target.model, target.params, *some, max_new_tokens=limit, capacity=CONTEXT + MOST
            )

        def by(plan: list[int], controller: Controller) -> Callable[[int, text.Prompts], Generation]:
            return lambda limit, some: specjax.generate(
                target.model, target.params, drafter, draft.params, *some, controller=controller,
                controller_state=_state(plan), max_new_tokens=limit, capacity=CONTEXT + MOST,
            )  # fmt: skip

        followed = _followed(rows)
        plans = {**{f"always {size}": plan for size, plan in ALWAYS.items()}, **MIXED}
        ways = {"plain": plain, **{name: by(plan, followed) for name, plan in plans.items()}}
        _show(rows, *_measure(ways, batches, repeats))


def _followed(rows: int) -> Controller:
    def init(batch: int) -> PyTree:
        del batch
        return _state([0])

    return Controller(
        init=init,
        draft_len=lambda state, all_rows: jnp.broadcast_to(state[0][state[2] % state[1]], (rows,)),
        update=lambda state, info: (state[0], state[1], state[2] + 1),
        buckets=BUCKETS,
    )


def _state(plan: list[int]) -> PyTree:
    return jnp.asarray(plan + [0] * (PERIOD - len(plan)), jnp.int32), jnp.int32(len(plan)), jnp.int32(0)


def _measure(ways, batches, repeats: int) -> tuple[dict[str, float], dict[str, list[Generation]]]:
    """Plain steps that each way takes, and what it generated."""
    outs = {}
    for name, run in ways.items():
        for limit in (1, MOST):
            outs[name] = [jax.block_until_ready(run(limit, some)) for some in batches]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            times[name].append(_seconds(run, batches, MOST) - _seconds(run, batches, 1))
    steps = sum(int(out.stats.rounds.max()) for out in outs["plain"])
    ratios = {name: [a / b for a, b in zip(own, times["plain"], strict=True)] for name, own in times.items()}
    return {name: steps * statistics.median(own) for name, own in ratios.items()}, outs


def _seconds(run, batches, limit: int) -> float:
    begin = time.perf_counter()
    for some in batches:
        jax.block_until_ready(run(limit, some))
    return time.perf_counter() - begin


def _show(rows: int, steps: dict[str, float], outs: dict[str, list[Generation]]) -> None:
    costs: dict[int, float] = {}
    for size in ALWAYS:
        counts = _rounds(outs[f"always {size}"])
        plain = counts[0] * costs[0] if size else 0.0
        costs[size] = (steps[f"always {size}"] - plain) / (counts[1:].sum() if size else counts[0])
        print(f"{rows} rows, a round of {size}: {costs[size]:.3f} plain steps")
    for name in MIXED:
        counts = _rounds(outs[name])
        # The last drafts of a text are shorter: they cost what the longest of the plan do, or a little less.
        apart = counts[0] * costs[0] + counts[1:].sum() * costs[max(MIXED[name])]
        again, late = (
            sum(int(getattr(out.stats, field).max()) for out in outs[name]) for field in ("resumed", "caught_up")
        )
        more = steps[name] - apart
        print(f"{rows} rows, {name}: {more / again:.2f} plain steps each of {again} times, {late} tokens behind in all")


def _rounds(outs: list[Generation]) -> np.ndarray:
    """How many rounds of the batches had a longest draft of 0, 1, ... tokens."""
    parts = [jax.device_get(out.stats) for out in outs]
    return np.sum([part.by_longest[np.argmax(part.rounds)] for part in parts], 0)


if __name__ == "__main__":
    typer.run(main)
