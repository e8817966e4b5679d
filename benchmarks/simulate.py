"""What adaptive draft lengths make of real texts, on machines that are not here: counted, not timed.

    python benchmarks/simulate.py --batch 1 --batch 4 --batch 16

Greedy, so a round keeps the draft tokens that agree with the target's own continuation: how many that would be from
each place of each text is found once, by drafting from all places at once. Then any policy is run over it in a moment,
at the costs of any machine. The constants of `controllers.throughput` were chosen with this; with `--groups 8` every
eighth of the texts is a case of its own, which shows the bad luck that a sum over many texts hides.
"""

from __future__ import annotations

import functools
import importlib
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from prompts import code_prompts
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import specjax
from specjax import controllers, models
from specjax.costs import Costs, Profile
from specjax.types import Controller, Round, Rows

CONTEXT, LONGEST = 64, 8
BUCKETS = (0, 1, 2, 3, 5, 8)

# In plain steps: rounds with 0 to 8 draft tokens, and what drafts after rounds without one cost on top, for the change
# and for each token that the drafter then has to read. Profiles found them (the latter two once for all of a size, and
# `Costs` has only the change). The accelerator is made up: a pass over a few tokens is nearly free, so is catching up.
MACHINES = {
    "AMD, another, batch 1": ((1.01, 1.85, 2.38, 2.55, 2.80, 2.88, 3.70, 3.80, 3.92), (1.7, 0.007)),
    "AMD, 2 cores, batch 1": ((1.01, 1.78, 2.32, 2.55, 2.75, 2.81, 4.11, 4.18, 4.25), (1.6, 0.014)),
    "Intel, 2 cores, batch 1": ((1.00, 3.33, 3.33, 3.86, 4.20, 4.33, 5.43, 5.57, 5.70), (1.6, 0.01)),
    "Intel, another hour, batch 1": ((1.00, 1.71, 1.94, 2.17, 2.35, 2.49, 3.41, 3.54, 3.68), (1.6, 0.014)),
    "Intel, 2 cores, batch 4": ((1.00, 1.44, 2.03, 2.27, 2.65, 2.74, 2.98, 3.07, 3.16), (1.9, 0.012)),
    "Intel, 2 cores, batch 16": ((1.01, 1.61, 1.92, 2.23, 2.82, 2.90, 3.66, 3.75, 3.83), (1.9, 0.017)),
    "Intel, another hour, batch 16": ((1.03, 1.76, 2.06, 2.46, 3.22, 3.32, 3.88, 3.98, 4.09), (1.9, 0.017)),
    "accelerator": ((1.00, 1.11, 1.21, 1.31, 1.43, 1.53, 1.65, 1.75, 1.85), (0.1, 0.003)),
}


def main(
    batch: Annotated[list[int], typer.Option(help="rows at once; may be given several times")] = [1, 4, 16],  # noqa: B006
    num_prompts: int = 32,
    groups: Annotated[int, typer.Option(help="of prompts, each a case of its own")] = 1,
    draft: Annotated[list[str], typer.Option(help="shipped, random, ...; default all")] = [],  # noqa: B006
    max_new_tokens: int = 128,
    constant: Annotated[list[str], typer.Option(help="_NAME=NUMBER of controllers/throughput.py, another value")] = [],  # noqa: B006
) -> None:
    """Prints, for each machine, draft and batch size, the cost of the policy over that of the best fixed length."""
    policy = importlib.import_module("specjax.controllers.throughput")
    for name, _, value in (text.partition("=") for text in constant):
        setattr(policy, name, type(getattr(policy, name))(value))
    table = Table(title="cost over that of the best fixed draft length, plain decoding among them")
    over_best: list[tuple[float, ...]] = []
    over_plain: list[tuple[float, ...]] = []
    columns = (
        "machine",
        "draft",
        "batch",
        "best K",
        "its speed-up",
        "throughput",
        "from nothing",
        "additive",
        "mean K",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("machine", "draft") else "right")
    cases = [
        (name, lengths)
        for kept in np.array_split(_kept(num_prompts, max_new_tokens), groups)
        for name, lengths in _drafts(kept).items()
        if name in (draft or [name])
    ]
    for machine, (rounds, extra) in MACHINES.items():
        profile = _profile(rounds, extra[0])
        for name, lengths in cases:
            for rows in batch:
                if "batch" in machine and not machine.endswith(f"batch {rows}"):
                    continue
                sizes = range(1, LONGEST + 1)
                fixed = [_cost(controllers.fixed(size), lengths, rows, rounds)[0] for size in sizes]
                plain = (max_new_tokens - 1) * (len(lengths) // rows) * rounds[0]
                costs = [plain, *fixed]
                best = int(np.argmin(costs))
                adaptive = controllers.throughput(profile)
                carried, mean = _cost(adaptive, lengths, rows, rounds, extra, carry=True)
                anew, _ = _cost(adaptive, lengths, rows, rounds, extra)
                heuristic, _ = _cost(controllers.additive(LONGEST), lengths, rows, rounds)
                over_best.append((carried / costs[best], anew / costs[best], heuristic / costs[best]))
                over_plain.append((carried / plain, anew / plain, heuristic / plain))
                table.add_row(
                    machine, name, str(rows), str(best), f"{plain / costs[best]:.2f}", f"{carried / costs[best]:.3f}",
                    f"{anew / costs[best]:.3f}", f"{heuristic / costs[best]:.3f}", f"{mean:.1f}",
                )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    for name, found in (("best", over_best), ("plain decoding", over_plain)):
        said = (f"{mean:.3f} and {worst:.3f}" for mean, worst in zip(np.mean(found, 0), np.max(found, 0), strict=True))
        console.print(f"over {name}, mean and worst: {next(said)}; from nothing {next(said)}; additive {next(said)}")


def _drafts(kept: np.ndarray) -> dict[str, np.ndarray]:
    texts, most = kept.shape
    place, text = np.arange(most)[None], np.arange(texts)[:, None]
    return {
        "shipped": kept,
        "random": np.zeros_like(kept),
        "collapse": np.where(place < most // 2, kept, 0),
        "rise": np.where(place >= most // 2, kept, 0),
        "every 4th text": np.where(text % 4 == 3, 0, kept),
    }


def _kept(num_prompts: int, most: int) -> np.ndarray:
    """[texts, most] int32: after so many tokens of each text, how many greedy draft tokens the target would keep."""
    target = models.load(models.PRETRAINED / "target", dtype=jnp.float32)
    draft = models.load(models.PRETRAINED / "draft", dtype=jnp.float32)
    tokenizer = Tokenizer.from_file(str(models.PRETRAINED / "target/tokenizer.json"))
    prompts = code_prompts(tokenizer, num_prompts, shortest=CONTEXT, longest=CONTEXT)
    made = specjax.autoregressive(target.model, target.params, *prompts, max_new_tokens=most + LONGEST)
    texts = np.asarray(made.tokens)[:, : CONTEXT + most + LONGEST]
    lengths = jnp.arange(CONTEXT, CONTEXT + most)
    kept = []
    for text in texts:
        several = jnp.broadcast_to(jnp.asarray(text), (most, len(text)))
        out = specjax.autoregressive(draft.model, draft.params, several, lengths, max_new_tokens=LONGEST)
        drafted = np.asarray([new[:LONGEST] for new in out.new_tokens()])
        wanted = np.asarray([text[length : length + LONGEST] for length in lengths])
        kept.append(np.cumprod(drafted == wanted, -1).sum(-1))
    return np.asarray(kept, np.int32)


def _profile(rounds: tuple[float, ...], change: float) -> Profile:
    drafts = tuple(0.1 * size for size in range(LONGEST + 1))
    costs = tuple(Costs(rows, CONTEXT, 1.0, rounds, drafts, change) for rows in (1, 1000))
    return Profile(jax.devices()[0].device_kind, BUCKETS, costs)


def _cost(
    controller: Controller, kept: np.ndarray, batch: int, rounds, extra=(0.0, 0.0), carry: bool = False
) -> tuple[float, float]:
    """Plain steps that all texts take, the second time they are seen if what was learnt is carried; the mean K."""
    state, found = controller.init(batch), []
    places = range(0, len(kept) - batch + 1, batch)
    for at in [*places, *places] if carry else places:
        given = (kept[at : at + batch], jnp.asarray(rounds), jnp.asarray(extra))
        after, counts = _text(controller, state, *given)
        state = controller.begin(after) if carry and controller.begin is not None else controller.init(batch)
        found.append(np.asarray(counts, np.float64))
    steps, drafted, turns = np.sum(found[-len(places) :], 0)
    return float(steps), float(drafted / turns)


@functools.partial(jax.jit, static_argnums=0)
def _text(controller: Controller, state, kept, rounds, extra):
    """One batch of texts: the controller's state after it, and (plain steps, draft tokens a row, rounds)."""
    batch, most = kept.shape

    def turn(carry):
        state, done, idle, found = carry
        rows = _rows(done, most)
        active = done < most
        sizes = jnp.where(active, jnp.clip(controller.draft_len(state, rows), 0, most - done - 1), 0)
        longest = jnp.max(sizes)
        accepted = jnp.where(active, jnp.minimum(kept[jnp.arange(batch), done % most], sizes), 0)
        emitted = jnp.where(active, accepted + 1, 0)
        info = Round(**{
            **dict.fromkeys(Round._fields), "draft_lengths": sizes, "num_accepted": accepted, "num_emitted": emitted,
        })  # fmt: skip
        # The change is paid where drafts end: a text that drafts all along does not pay it.
        ends = (longest == 0) & (idle == 0) & (found[2] > 0)
        late = jnp.where(ends, extra[0], jnp.where((longest > 0) & (idle > 0), extra[1] * idle, 0.0))
        found = found + jnp.asarray([rounds[longest] + late, longest, 1.0])
        return controller.update(state, info), done + emitted, jnp.where(longest > 0, 0, idle + 1), found

    done = jnp.ones((batch,), jnp.int32)
    begin = (state, done, jnp.int32(0), jnp.zeros((3,), jnp.float32))
    state, _, _, found = jax.lax.while_loop(lambda carry: jnp.any(carry[1] < most), turn, begin)
    return state, found


def _rows(done, most: int) -> Rows:
    """As much of them as controllers read."""
    given = {
        "lengths": CONTEXT + done,
        "limits": jnp.full_like(done, CONTEXT + most),
        "draft_limits": jnp.full_like(done, LONGEST),
        "status": jnp.where(done < most, specjax.Status.ACTIVE, specjax.Status.LENGTH),
    }
    return Rows(**{**dict.fromkeys(Rows._fields), **given})


if __name__ == "__main__":
    typer.run(main)
