"""specjax and its peers on the shipped pair: one run, the same weights and prompts, medians of paired repetitions.

    python benchmarks/run.py --draft-len 3 --draft-len 5 --batch 1 --batch 8
    python benchmarks/run.py --peer --json out.json        # transformers on PyTorch too (slow)

Every repetition runs each contender once, in turn, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from prompts import Prompts, code_prompts
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import specjax
from specjax import models
from specjax.types import Generation


class Contender(NamedTuple):
    """One way to generate; `run` returns the emitted ids of each prompt."""

    name: str
    run: Callable[[], list[list[int]]]
    stats: list  # filled by specjax contenders: the Stats of the last run


class Result(NamedTuple):
    """One row of the table."""

    name: str
    batch: int
    tokens_per_second: float
    speedup: float  # over specjax's autoregressive loop, median of paired ratios
    seconds: float
    acceptance: float | None
    tokens_per_round: float | None
    equal: bool  # the same tokens as the autoregressive loop


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
    peer: Annotated[bool, typer.Option(help="measure transformers on PyTorch as well (batch 1)")] = False,
    model: Annotated[Path, typer.Option(help="target folder")] = models.PRETRAINED / "target",
    draft: Annotated[Path, typer.Option(help="draft folder")] = models.PRETRAINED / "draft",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
) -> None:
    """Measures and prints a table."""
    target, drafter = models.load(model, dtype=jnp.dtype(dtype)), models.load(draft, dtype=jnp.dtype(dtype))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = code_prompts(tokenizer, num_prompts, shortest=shortest, longest=longest)
    sampling = specjax.Sampling(temperature=temperature)
    results: list[Result] = []
    for rows in batch:
        contenders = [_autoregressive(target, prompts, rows, max_new_tokens, sampling)]
        contenders += [_speculative(target, drafter, prompts, rows, max_new_tokens, sampling, k) for k in draft_len]
        if peer and rows == 1 and temperature == 0:
            contenders += _transformers(model, draft, prompts, max_new_tokens, draft_len, dtype)
        results += _measure(contenders, rows, repeats)
    _show(results, temperature)
    if json_file is not None:
        machine = {"device": jax.devices()[0].device_kind, "machine": platform.machine(), "jax": jax.__version__}
        setting = {"dtype": dtype, "temperature": temperature, "max_new_tokens": max_new_tokens, "repeats": repeats}
        rows_out = [result._asdict() for result in results]
        json_file.write_text(json.dumps({**machine, **setting, "results": rows_out}, indent=2) + "\n")


def _batches(prompts: Prompts, rows: int):
    for start in range(0, len(prompts.lengths), rows):
        yield jnp.asarray(prompts.tokens[start : start + rows]), jnp.asarray(prompts.lengths[start : start + rows])


def _collect(call: Callable[..., Generation], prompts: Prompts, rows: int, stats: list) -> list[list[int]]:
    out = [call(tokens, lengths) for tokens, lengths in _batches(prompts, rows)]
    stats[:] = [generation.stats for generation in out]
    return [row for generation in out for row in generation.new_tokens()]


def _autoregressive(target, prompts, rows, max_new_tokens, sampling) -> Contender:
    def call(tokens, lengths):
        return specjax.autoregressive(
            target.model, target.params, tokens, lengths, max_new_tokens=max_new_tokens, sampling=sampling
        )

    stats: list = []
    return Contender("specjax autoregressive", lambda: _collect(call, prompts, rows, stats), stats)


def _speculative(target, draft, prompts, rows, max_new_tokens, sampling, draft_len) -> Contender:
    drafter, controller = specjax.drafters.draft_model(draft.model), specjax.controllers.fixed(draft_len)

    def call(tokens, lengths):
        return specjax.generate(
            target.model, target.params, drafter, draft.params, tokens, lengths,
            max_new_tokens=max_new_tokens, sampling=sampling, controller=controller,
        )  # fmt: skip

    stats: list = []
    return Contender(f"specjax speculative K={draft_len}", lambda: _collect(call, prompts, rows, stats), stats)


def _transformers(target_path, draft_path, prompts, max_new_tokens, draft_lens, dtype) -> list[Contender]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()

    def read(path: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    target, draft = read(target_path), read(draft_path)
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0

    def run(**options) -> list[list[int]]:
        emitted = []
        for tokens, length in zip(prompts.tokens, prompts.lengths, strict=True):
            ids = torch.tensor(tokens[None, :length].astype(np.int64))
            with torch.no_grad():
                out = target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                    eos_token_id=None, pad_token_id=0, **options,
                )  # fmt: skip
            emitted.append(out[0, length:].tolist())
        return emitted

    def assisted(draft_len: int) -> list[list[int]]:
        draft.generation_config.num_assistant_tokens = draft_len
        return run(assistant_model=draft)

    greedy = Contender("transformers greedy", lambda: run(), [])
    helped = [Contender(f"transformers assisted K={k}", lambda k=k: assisted(k), []) for k in draft_lens]
    return [greedy, *helped, Contender("transformers prompt lookup", lambda: run(prompt_lookup_num_tokens=5), [])]


def _measure(contenders: list[Contender], rows: int, repeats: int) -> list[Result]:
    emitted = [contender.run() for contender in contenders]  # compiles and warms up
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for contender, times in zip(contenders, seconds, strict=True):
            start = time.perf_counter()
            contender.run()
            times.append(time.perf_counter() - start)
    results = []
    for contender, tokens, times in zip(contenders, emitted, seconds, strict=True):
        ratios = [base / own for base, own in zip(seconds[0], times, strict=True)]
        middle = statistics.median(times)
        is_speculative = bool(contender.stats) and contender.stats[0].drafted.shape[1] > 0
        summed = _sum(contender.stats) if is_speculative else None
        results.append(
            Result(
                contender.name,
                rows,
                sum(map(len, tokens)) / middle,
                statistics.median(ratios),
                middle,
                specjax.stats.acceptance_rate(summed) if summed else None,
                specjax.stats.tokens_per_round(summed) if summed else None,
                tokens == emitted[0],
            )
        )
    return results


def _sum(parts: list[specjax.Stats]) -> specjax.Stats:
    return specjax.Stats(*(jnp.concatenate(counts) for counts in zip(*parts, strict=True)))


def _show(results: list[Result], temperature: float) -> None:
    table = Table(title=f"{jax.devices()[0].device_kind}, temperature {temperature:g}")
    for name in ("contender", "batch", "tokens/s", "speed-up", "acceptance", "tokens/round", "same tokens"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for row in results:
        share = "" if row.acceptance is None else f"{row.acceptance:.0%}"
        per_round = "" if row.tokens_per_round is None else f"{row.tokens_per_round:.2f}"
        same = "yes" if row.equal else "no"
        table.add_row(
            row.name, str(row.batch), f"{row.tokens_per_second:.0f}", f"{row.speedup:.2f}", share, per_round, same
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
