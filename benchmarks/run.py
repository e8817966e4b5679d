"""specjax and its peers on the shipped pair: one run, the same weights and prompts, medians of paired repetitions.

    python benchmarks/run.py --draft-len 3 --draft-len 5 --batch 1 --batch 8
    python benchmarks/run.py --peer transformers --json out.json                              # PyTorch, slow
    python benchmarks/run.py --peer llama.cpp --peer-python /path/to/an/environment/bin/python

Every repetition runs each contender once, in turn, so that a busy machine slows all of them alike. Peers come with the
extra `peers`; llama.cpp may live in an environment of its own.
"""

from __future__ import annotations

import enum
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import peers
import typer
from peers import Contender, Outcome
from prompts import Prompts, code_prompts
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import specjax
from specjax import models
from specjax.profiling import roofline
from specjax.profiling.forward import time_pass
from specjax.profiling.machine import Machine, this_machine
from specjax.types import Generation


class Peer(enum.StrEnum):
    """What to measure beside specjax; greedy and one row at a time."""

    transformers = "transformers"
    llama_cpp = "llama.cpp"


class Result(NamedTuple):
    """One row of the table."""

    name: str
    batch: int
    tokens_per_second: float
    speedup: float  # over specjax's autoregressive loop, median of paired ratios
    seconds: float
    acceptance: float | None
    tokens_per_round: float | None
    over_limit: float | None  # seconds over what the machine needs at least for the same passes, prefill not counted
    equal: bool  # the same tokens as the autoregressive loop


class Passes(NamedTuple):
    """Milliseconds of one forward pass."""

    name: str
    live: int  # tokens in the cache
    one: float  # over one token
    verify: float  # over K + 1 tokens
    draft: float  # of the draft model, over one token


def main(
    draft_len: Annotated[list[int], typer.Option(help="K; may be given several times")] = [3, 5],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="rows at once; may be given several times")] = [1],  # noqa: B006
    num_prompts: Annotated[int, typer.Option(help="prompts per repetition")] = 8,
    shortest: Annotated[int, typer.Option(help="tokens of the shortest prompt")] = 24,
    longest: Annotated[int, typer.Option(help="tokens of the longest prompt")] = 64,
    max_new_tokens: int = 128,
    repeats: Annotated[int, typer.Option(help="paired repetitions; medians are reported")] = 5,
    dtype: str = "float32",
    temperature: float = 0.0,
    peer: Annotated[list[Peer], typer.Option(help="measure this as well (batch 1); may be given several times")] = [],  # noqa: B006
    peer_python: Annotated[str, typer.Option(help="the Python that has llama-cpp-python and gguf")] = sys.executable,
    threads: Annotated[int, typer.Option(help="llama.cpp's threads")] = os.cpu_count() or 1,
    model: Annotated[Path, typer.Option(help="target folder")] = models.PRETRAINED / "target",
    draft: Annotated[Path, typer.Option(help="draft folder")] = models.PRETRAINED / "draft",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
) -> None:
    """Measures and prints a table."""
    target, drafter = models.load(model, dtype=jnp.dtype(dtype)), models.load(draft, dtype=jnp.dtype(dtype))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = code_prompts(tokenizer, num_prompts, shortest=shortest, longest=longest)
    sampling = specjax.Sampling(temperature=temperature)
    machine = this_machine(dtype)
    greedy = temperature == 0
    slots = longest + max_new_tokens + max(draft_len) + 1
    engines = [
        peers.LlamaCpp(peer_python, model, draft, kind, slots, threads)
        for kind in ("float32", "float16")
        if Peer.llama_cpp in peer and greedy
    ]
    results: list[Result] = []
    for rows in batch:
        contenders = [_autoregressive(target, prompts, rows, max_new_tokens, sampling)]
        contenders += [_speculative(target, drafter, prompts, rows, max_new_tokens, sampling, k) for k in draft_len]
        if rows == 1 and greedy:
            if Peer.transformers in peer:
                contenders += peers.transformers(model, draft, prompts, max_new_tokens, draft_len, dtype)
            for engine in engines:
                contenders += engine.contenders(prompts, max_new_tokens, draft_len)
        live = float(prompts.lengths.mean()) + max_new_tokens / 2
        floor = _floor(target, drafter, rows, live, machine)
        results += _measure(contenders, rows, repeats, floor)
    _show(results, temperature, machine)
    timed = _passes(
        target, drafter, engines, max(draft_len), int(prompts.lengths.mean()) + max_new_tokens // 2, repeats
    )
    _show_passes(timed, max(draft_len))
    about = engines[0].ask("about") if engines else None
    for engine in engines:
        engine.close()
    if json_file is not None:
        said = {"device": jax.devices()[0].device_kind, "machine": platform.machine(), "jax": jax.__version__}
        said |= {"limits": machine._asdict(), "llama.cpp": about}
        setting = {"dtype": dtype, "temperature": temperature, "max_new_tokens": max_new_tokens, "repeats": repeats}
        rows_out = [result._asdict() for result in results]
        passes_out = [part._asdict() for part in timed]
        json_file.write_text(
            json.dumps({**said, **setting, "results": rows_out, "passes": passes_out}, indent=2) + "\n"
        )


def _batches(prompts: Prompts, rows: int):
    for start in range(0, len(prompts.lengths), rows):
        yield jnp.asarray(prompts.tokens[start : start + rows]), jnp.asarray(prompts.lengths[start : start + rows])


def _collect(call: Callable[..., Generation], prompts: Prompts, rows: int) -> Outcome:
    out = [call(tokens, lengths) for tokens, lengths in _batches(prompts, rows)]
    tokens = [row for generation in out for row in generation.new_tokens()]
    rounds = [jax.device_get(generation.stats.rounds) for generation in out]
    drafted, accepted = (
        sum(int(getattr(generation.stats, name).sum()) for generation in out) for name in ("drafted", "accepted")
    )
    return Outcome(tokens, sum(int(x.max()) for x in rounds), sum(int(x.sum()) for x in rounds), drafted, accepted)


def _autoregressive(target, prompts, rows, max_new_tokens, sampling) -> Contender:
    def call(tokens, lengths):
        return specjax.autoregressive(
            target.model, target.params, tokens, lengths, max_new_tokens=max_new_tokens, sampling=sampling
        )

    return Contender("specjax autoregressive", lambda: _collect(call, prompts, rows), None, _dtype(target))


def _speculative(target, draft, prompts, rows, max_new_tokens, sampling, draft_len) -> Contender:
    drafter, controller = specjax.drafters.draft_model(draft.model), specjax.controllers.fixed(draft_len)

    def call(tokens, lengths):
        return specjax.generate(
            target.model, target.params, drafter, draft.params, tokens, lengths,
            max_new_tokens=max_new_tokens, sampling=sampling, controller=controller,
        )  # fmt: skip

    name = f"specjax speculative K={draft_len}"
    return Contender(name, lambda: _collect(call, prompts, rows), draft_len, _dtype(target))


def _dtype(loaded: Any) -> str:
    return str(jax.tree.leaves(loaded.params)[0].dtype)


def _floor(target, draft, rows: int, live: float, machine: Machine) -> Callable[[Contender, int], float]:
    """(contender, target passes) -> the seconds that the machine needs at least."""

    def floor(contender: Contender, passes: int) -> float:
        def cast(params):  # shapes alone: a peer's numbers may be narrower than ours
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(contender.dtype)), params)

        own, options = (target.model, cast(target.params)), {"batch": rows, "live": live}
        if contender.draft_len is None:
            work = roofline.step(*own, **options)
        else:
            work = roofline.speculation(*own, draft.model, cast(draft.params), draft_len=contender.draft_len, **options)
        return passes * roofline.seconds(work, machine)

    return floor


def _measure(
    contenders: list[Contender], rows: int, repeats: int, floor: Callable[[Contender, int], float]
) -> list[Result]:
    outcomes = [contender.run() for contender in contenders]  # compiles and warms up
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for contender, times in zip(contenders, seconds, strict=True):
            start = time.perf_counter()
            contender.run()
            times.append(time.perf_counter() - start)
    results = []
    for contender, outcome, times in zip(contenders, outcomes, seconds, strict=True):
        ratios = [base / own for base, own in zip(seconds[0], times, strict=True)]
        middle = statistics.median(times)
        count = sum(map(len, outcome.tokens))
        passes, row_passes = outcome.passes, outcome.row_passes
        results.append(
            Result(
                contender.name,
                rows,
                count / middle,
                statistics.median(ratios),
                middle,
                outcome.accepted / outcome.drafted if outcome.drafted and outcome.accepted is not None else None,
                (count - len(outcome.tokens)) / row_passes if contender.draft_len and row_passes else None,
                middle / floor(contender, passes) if passes else None,
                outcome.tokens == outcomes[0].tokens,
            )
        )
    return results


def _passes(target, draft, engines: list[peers.LlamaCpp], draft_len: int, live: int, repeats: int) -> list[Passes]:
    """One pass of each engine, apart from any loop around it."""
    found: dict[str, list[list[float]]] = {}
    for _ in range(repeats):
        turn = {
            f"specjax {_dtype(target)}": [
                time_pass(part.model, part.params, tokens=width, live=live, passes=32, repeats=1)
                for part, width in ((target, 1), (target, draft_len + 1), (draft, 1))
            ]
        }
        for engine in engines:
            asked = (("pass", 1), ("pass", draft_len + 1), ("draft pass", 1))
            turn[f"llama.cpp {engine.dtype}"] = [
                engine.ask(what, tokens=width, live=live, repeats=15)["seconds"] for what, width in asked
            ]
        for name, times in turn.items():
            found.setdefault(name, []).append(times)
    middles = {name: [1e3 * statistics.median(x) for x in zip(*turns, strict=True)] for name, turns in found.items()}
    return [Passes(name, live, *times) for name, times in middles.items()]


def _show(results: list[Result], temperature: float, machine: Machine) -> None:
    limit = f"{machine.bandwidth / 1e9:.3g} GB/s, {machine.flops / 1e9:.3g} GFLOP/s, {machine.origin}"
    table = Table(title=f"{machine.name}, temperature {temperature:g}", caption=f"limit: {limit}; prefill not counted")
    names = ("contender", "batch", "tokens/s", "speed-up", "acceptance", "tokens/round", "over limit", "same tokens")
    for name in names:
        table.add_column(name, justify="left" if name == "contender" else "right")
    for row in results:
        share = "" if row.acceptance is None else f"{row.acceptance:.0%}"
        per_round, over = ("" if x is None else f"{x:.2f}" for x in (row.tokens_per_round, row.over_limit))
        numbers = (str(row.batch), f"{row.tokens_per_second:.0f}", f"{row.speedup:.2f}", share, per_round, over)
        table.add_row(row.name, *numbers, "yes" if row.equal else "no")
    Console(width=max(120, Console().width)).print(table)


def _show_passes(timed: list[Passes], draft_len: int) -> None:
    table = Table(title=f"one forward pass, ms, {timed[0].live} tokens in the cache")
    for name in ("", "1 token", f"{draft_len + 1} tokens", "ratio", "draft, 1 token"):
        table.add_column(name, justify="right" if name else "left")
    for part in timed:
        ratio = f"{part.verify / part.one:.2f}"
        table.add_row(part.name, f"{part.one:.2f}", f"{part.verify:.2f}", ratio, f"{part.draft:.2f}")
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    typer.run(main)
