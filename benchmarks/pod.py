"""Measures generation on a TPU pod, or any mesh: run the same command on every host.

    python benchmarks/pod.py --model FOLDER --draft FOLDER --data 2 --model-axis 8

Every host reads its own parts of the checkpoints; the first one prints the table and saves it. A rehearsal on one
machine, two processes of four simulated devices each:

    for i in 0 1; do python benchmarks/pod.py --simulate 4 --coordinator 127.0.0.1:9911 --processes 2 --process $i \
        --data 2 --model-axis 4 --check & done; wait
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import specjax
from specjax import models, sharding, text
from specjax.cli import exactness
from specjax.models import Loaded


class Result(NamedTuple):
    """One contender, medians."""

    name: str
    tokens_per_second: float  # all rows
    per_chip: float
    seconds: float  # of one call, prefill included
    passes: int  # target passes of the slowest row
    acceptance: float | None
    tokens_per_round: float | None
    same_tokens: bool  # as plain decoding on the mesh


def main(
    model: Annotated[str, typer.Option(help="Target: folder or hub id; the same path on every host.")] = "",
    draft: Annotated[str, typer.Option(help="Draft model. Neither: the shipped pair.")] = "",
    data: Annotated[int, typer.Option(help="Devices that the rows are cut over.")] = 1,
    model_axis: Annotated[int, typer.Option(help="Devices that a model is cut over; 0 takes what is left.")] = 0,
    sub: Annotated[int, typer.Option(help="Further cut, where key/value heads are fewer than devices.")] = 1,
    draft_cut: Annotated[bool, typer.Option(help="Cut the draft as well, or keep it whole on every device.")] = True,
    batch: int = 8,
    max_new_tokens: int = 128,
    draft_len: Annotated[list[int], typer.Option()] = [3, 5],  # noqa: B006 (typer reads it, nobody writes)
    temperature: float = 0.0,
    rounds_per_test: Annotated[int, typer.Option(help="Rounds between stop tests, an all-reduce each.")] = 4,
    dtype: Annotated[str, typer.Option(help="Default: as stored; float32 in a rehearsal.")] = "",
    repeats: int = 5,
    out: Path = Path("pod.json"),
    check: Annotated[
        bool, typer.Option(help="Compare with one device's tokens; float32, models that fit one.")
    ] = False,
    coordinator: Annotated[str, typer.Option(help="host:port. On Cloud TPUs JAX finds it alone.")] = "",
    processes: int = 1,
    process: int = 0,
    simulate: Annotated[int, typer.Option(help="Simulated CPU devices a process: a rehearsal.")] = 0,
) -> None:
    """Plain decoding and speculation on one mesh, paired runs, medians."""
    _connect(coordinator, processes, process, simulate)
    left = model_axis or max(len(jax.devices()) // (data * sub), 1)
    layout = sharding.layout(sharding.make_mesh(data=data, model=left, sub=sub))
    precision = jnp.dtype(dtype or "float32") if dtype or simulate else None
    paths = (model, draft) if model else tuple(str(models.PRETRAINED / name) for name in ("target", "draft"))
    layouts = (layout, layout if draft_cut else sharding.layout(layout.mesh, width=()))
    pair = [models.load(path, dtype=precision, layout=own) for path, own in zip(paths, layouts, strict=True)]
    prompts = _prompts(pair[0], batch)
    options = {
        "max_new_tokens": max_new_tokens, "rounds_per_test": rounds_per_test, "sampling": specjax.Sampling(temperature),
        "verifier": specjax.verify.coupled() if temperature else specjax.verify.rejection(),
    }  # fmt: skip
    results = _measure(pair, prompts, draft_len, repeats, options)
    agrees = _agrees(paths, precision, pair, prompts, options) if check else None
    if jax.process_index() == 0:
        _show(results, layout, batch, agrees)
        _save(out, results, layout, batch, agrees)
    if agrees is False or not all(result.same_tokens for result in results if precision == jnp.float32):
        raise SystemExit("the mesh gave other tokens than plain decoding: see the table")


def _connect(coordinator: str, processes: int, process: int, simulate: int) -> None:
    if simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulate)
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    elif "TPU_WORKER_HOSTNAMES" in os.environ and "," in os.environ["TPU_WORKER_HOSTNAMES"]:
        jax.distributed.initialize()  # a pod slice of several hosts tells JAX where they are


def _prompts(target: Loaded, batch: int) -> text.Prompts:
    assert target.path is not None
    tokenizer = text.load_tokenizer(target.path)
    return text.encode(tokenizer, [exactness.PROMPTS[row % len(exactness.PROMPTS)] for row in range(batch)])


def _contenders(pair: list[Loaded], prompts: text.Prompts, draft_lens: list[int], options: dict[str, Any]):
    target, draft = pair
    common = {name: value for name, value in options.items() if name != "verifier"}
    yield "autoregressive", lambda: specjax.autoregressive(target.model, target.params, *prompts, **common)
    drafter = specjax.drafters.draft_model(draft.model)
    for length in draft_lens:
        controller = specjax.controllers.fixed(length)
        yield (
            f"speculative K={length}",
            lambda controller=controller: specjax.generate(
                target.model, target.params, drafter, draft.params, *prompts, controller=controller, **options
            ),
        )


def _measure(pair, prompts, draft_lens, repeats: int, options) -> list[Result]:
    contenders = list(_contenders(pair, prompts, draft_lens, options))
    first = [jax.block_until_ready(run()) for _, run in contenders]  # compiles
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for (_, run), times in zip(contenders, seconds, strict=True):
            times.append(_time(run))
    plain = first[0].new_tokens()
    return [_result(name, out, times, plain) for (name, _), out, times in zip(contenders, first, seconds, strict=True)]


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _result(name: str, out: specjax.Generation, times: list[float], plain: list[list[int]]) -> Result:
    middle, tokens = statistics.median(times), out.new_tokens()
    rate = sum(map(len, tokens)) / middle
    stats = jax.device_get(out.stats)
    is_speculative = stats.drafted.shape[1] > 0
    return Result(
        name,
        rate,
        rate / len(jax.devices()),
        middle,
        int(stats.rounds.max()),
        specjax.stats.acceptance_rate(stats) if is_speculative else None,
        specjax.stats.tokens_per_round(stats) if is_speculative else None,
        tokens == plain,
    )


def _agrees(paths, precision, pair, prompts, options) -> bool:
    """Whether one device, in this process and for itself, gives the same tokens."""
    alone = [models.load(path, dtype=precision) for path in paths]
    ours, theirs = ([run().new_tokens() for _, run in _contenders(two, prompts, [5], options)] for two in (pair, alone))
    return ours == theirs


def _shape(layout: sharding.Layout) -> str:
    return ", ".join(f"{name}={size}" for name, size in layout.mesh.shape.items())


def _show(results: list[Result], layout: sharding.Layout, batch: int, agrees: bool | None) -> None:
    kind = jax.devices()[0].device_kind
    table = Table(title=f"{len(jax.devices())} x {kind}, {jax.process_count()} hosts, {_shape(layout)}, batch {batch}")
    for column in (
        "contender",
        "tokens/s",
        "a chip",
        "speed-up",
        "passes",
        "acceptance",
        "tokens/round",
        "same tokens",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    for result in results:
        share = "" if result.acceptance is None else f"{result.acceptance:.0%}"
        per_round = "" if result.tokens_per_round is None else f"{result.tokens_per_round:.2f}"
        table.add_row(
            result.name, f"{result.tokens_per_second:.0f}", f"{result.per_chip:.1f}",
            f"{results[0].seconds / result.seconds:.2f}", str(result.passes), share, per_round,
            "yes" if result.same_tokens else "no",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    if agrees is not None:
        console.print(f"one device gives {'the same' if agrees else 'OTHER'} tokens")


def _save(out: Path, results: list[Result], layout: sharding.Layout, batch: int, agrees: bool | None) -> None:
    content = {
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "processes": jax.process_count(),
        "mesh": dict(layout.mesh.shape),
        "batch": batch,
        "jax": jax.__version__,
        "agrees_with_one_device": agrees,
        "results": [result._asdict() for result in results],
    }
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=np.ndarray.tolist) + "\n", encoding="utf-8")
    os.replace(partial, out)


if __name__ == "__main__":
    typer.run(main)
