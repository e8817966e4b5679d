"""What one session on a GPU (or a TPU) should run: a single command that measures everything and writes it down.

    python benchmarks/gpu.py --json gpu.json            # 1B and 8B, bfloat16, and the shipped pair: about 10 minutes
    python benchmarks/gpu.py --rehearse --json /tmp/rehearsal.json      # the same on a CPU, tiny: minutes

Llama-shaped targets with random weights made on the device: the time of an autoregressive step over what the card's
memory allows (aim: 80% of the limit), of verifying 9 tokens over that of 1 (aim: 1.1), and speculation with a
SYNTHETIC drafter of set acceptance (synthetic.py; its cost is none, or that of a small model that is run beside it).
Against `transformers` with a static cache and torch.compile on the same card. Then the shipped pair, which is real.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# torch comes and goes before; jax need not take three quarters of the card at once, nor keep others out.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import synthetic
import typer
from rich.console import Console
from rich.table import Table

import specjax
from specjax import text
from specjax.cli import bench, bench_display, comparison, display
from specjax.cli.load_pair import load_pair
from specjax.profiling import roofline
from specjax.profiling.forward import time_pass
from specjax.profiling.machine import Machine, this_machine
from specjax.profiling.paired_timing import in_turn, paired_ratio
from specjax.types import Generation

LLAMA = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "model_type": "llama"}
SHAPES: dict[str, dict[str, Any]] = {  # Llama 3.2's and 3.1's
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "draft": {
        "vocab_size": 128256, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    },
}  # fmt: skip
_TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


class Task(NamedTuple):
    """What to measure."""

    batch: int
    context: int
    max_new_tokens: int
    repeats: int
    draft_len: int
    alpha: float
    dtype: str
    rehearse: bool

    def config(self, name: str) -> dict[str, Any]:
        """The shape called so; a tiny one in a rehearsal."""
        return {**LLAMA, **(_TINY if self.rehearse else SHAPES[name])}


def main(
    size: Annotated[list[str], typer.Option(help="1b, 8b; may be given several times")] = ["1b", "8b"],  # noqa: B006
    batch: int = 1,
    context: Annotated[int, typer.Option(help="tokens of each prompt")] = 1024,
    max_new_tokens: int = 256,
    draft_len: Annotated[int, typer.Option(help="K; verification is over K + 1 tokens")] = 8,
    alpha: Annotated[float, typer.Option(help="set share of right draft tokens")] = 0.8,
    repeats: int = 5,
    dtype: str = "bfloat16",
    rehearse: Annotated[bool, typer.Option(help="tiny shapes, for a try on a CPU: the numbers mean nothing")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here, after each part")] = None,
) -> None:
    """Measures and prints tables."""
    task = Task(batch, context, max_new_tokens, repeats, draft_len, alpha, dtype, rehearse)
    if rehearse:
        task = task._replace(context=32, max_new_tokens=4 * (draft_len + 1), repeats=1)
    peers = {name: _transformers(task, name) for name in size}  # first: its memory is free again afterwards
    machine = this_machine(dtype)
    said: dict[str, Any] = {"task": task._asdict(), "jax": jax.__version__, "machine": machine._asdict(), "parts": {}}
    for name in size:
        said["parts"][name] = {**_part(task, task.config(name), machine), "transformers": peers[name]}
        _show(name, said["parts"][name], task, machine)
        _write(json_file, said)
    setting = comparison.Setting(
        tuple(sorted({min(5, draft_len), draft_len})),
        prompts=1 if rehearse else 8,
        max_new_tokens=max(128, 4 * (draft_len + 1)),
        repeats=task.repeats,
    )
    found = bench.measure(load_pair(None, None, None, None), setting, lambda what: contextlib.nullcontext())
    display.Display(plain=False, silent=False).speed(found)
    said["shipped pair"] = bench_display.as_json([found])
    _write(json_file, said)


def _part(task: Task, config: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """One synthetic target: a step, a verification, rounds."""
    model, params = synthetic.successor(config, jax.random.key(0), task.dtype)
    draft, draft_params = synthetic.successor(task.config("draft"), jax.random.key(1), task.dtype)
    size = (task.batch, task.context)
    tokens = np.asarray(jax.random.randint(jax.random.key(2), size, 0, model.vocab_size, jnp.int32))
    prompts = text.Prompts(tokens, np.full((task.batch,), task.context, np.int32))
    runs = {
        "plain": _plain(task, model, params),
        "synthetic drafter, no cost": _speculative(task, model, params, None, ()),
        "synthetic drafter, a small model's cost": _speculative(task, model, params, draft, draft_params),
    }
    outputs = {name: run(task.max_new_tokens, prompts).new_tokens() for name, run in runs.items()}  # compiles
    timed = in_turn(
        {
            name: functools.partial(comparison.time_generations, run, [prompts], task.max_new_tokens)
            for name, run in runs.items()
        },
        task.repeats,
    )
    live = task.context + 5 * task.max_new_tokens / 8
    options = {"batch": task.batch, "live": live}
    least = roofline.seconds(roofline.step(model, params, **options), machine)
    widths = (1, task.draft_len + 1)
    one, verify = (
        time_pass(model, params, tokens=width, live=task.context, batch=task.batch, repeats=task.repeats)
        for width in widths
    )
    verifying = roofline.count(model, params, tokens=task.draft_len + 1, **options)
    drafting = roofline.speculation(model, params, draft, draft_params, draft_len=task.draft_len, **options)
    passes_of = dict(zip(runs, ([], [verifying], drafting), strict=True))
    plain = timed["plain"]
    step = statistics.median(x.seconds for x in plain)
    rounds = {
        name: {
            "seconds": statistics.median(x.seconds for x in own),
            "limit_seconds": roofline.seconds(passes_of[name], machine),
            "tokens_per_round": own[0].tokens_per_pass,
            "acceptance": own[0].acceptance,
            "speedup": own[0].tokens_per_pass * paired_ratio([x.seconds for x in plain], [x.seconds for x in own]),
            "same_tokens": outputs[name] == outputs["plain"],
        }
        for name, own in timed.items()
        if name != "plain"
    }
    return {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "work_of_a_step": roofline.total(roofline.step(model, params, **options))._asdict(),
        "step_seconds": step,
        "limit_seconds": least,
        "share_of_limit": least / step,  # aim: 0.8
        "pass_seconds": {str(width): seconds for width, seconds in zip(widths, (one, verify), strict=True)},
        "verify_over_one": verify / one,  # aim: 1.1 for 9 tokens
        "rounds": rounds,
    }


def _plain(task: Task, model, params) -> Callable[[int, text.Prompts], Generation]:
    def run(limit: int, prompts: text.Prompts) -> Generation:
        return specjax.autoregressive(model, params, *prompts, **_options(task, limit))

    return run


def _speculative(task: Task, model, params, draft, draft_params) -> Callable[[int, text.Prompts], Generation]:
    drafter = synthetic.drafter(model.vocab_size, task.alpha, draft)
    controller = specjax.controllers.fixed(task.draft_len)

    def run(limit: int, prompts: text.Prompts) -> Generation:
        return specjax.generate(
            model, params, drafter, draft_params, *prompts, controller=controller, **_options(task, limit)
        )

    return run


def _options(task: Task, limit: int) -> dict[str, Any]:
    return {
        "max_new_tokens": np.full((task.batch,), limit, np.int32),
        "capacity": task.context + task.max_new_tokens,
    }


def _transformers(task: Task, name: str) -> dict[str, Any]:
    script = Path(__file__).with_name("gpu_transformers.py")
    numbers = ["--context", task.context, "--max-new-tokens", task.max_new_tokens, "--repeats", task.repeats]
    numbers += ["--batch", task.batch]
    command = [sys.executable, str(script), json.dumps(task.config(name)), *map(str, numbers)]
    ran = subprocess.run(
        command + ["--rehearse"] * task.rehearse, capture_output=True, text=True, timeout=1800, check=False
    )
    if ran.returncode != 0:
        return {"skipped": f"it failed: {ran.stderr.strip()[-500:]}"}
    return json.loads(ran.stdout.splitlines()[-1])


def _show(name: str, part: dict[str, Any], task: Task, machine: Machine) -> None:
    rehearsal = " (rehearsal: these numbers mean nothing)" if task.rehearse else ""
    table = Table(title=f"{name}, {part['num_params'] / 1e9:.3g}B, {task.dtype}, {machine.name}{rehearsal}")
    for column in ("", "ms", "tokens/round", "speed-up", "", "aim"):
        table.add_column(column, justify="right" if column else "left")
    step, least = part["step_seconds"], part["limit_seconds"]
    origin = f"{part['share_of_limit']:.0%} of the limit, {1e3 * least:.2f} ms ({machine.origin})"
    table.add_row("autoregressive step", f"{1e3 * step:.2f}", "", "1", origin, "80%")
    for width, seconds in part["pass_seconds"].items():
        ratio = "" if width == "1" else f"{part['verify_over_one']:.2f} times one token"
        table.add_row(f"a pass over {width}", f"{1e3 * seconds:.2f}", "", "", ratio, "1.1" if ratio else "")
    for kind, found in part["rounds"].items():
        same = "the same tokens" if found["same_tokens"] else "OTHER TOKENS THAN PLAIN DECODING"
        over = f"{found['seconds'] / found['limit_seconds']:.2f} times the limit"
        said = f"SYNTHETIC, set to {task.alpha:.0%}; {over}, {same}"
        numbers = (f"{1e3 * found['seconds']:.2f}", f"{found['tokens_per_round']:.2f}", f"{found['speedup']:.2f}")
        table.add_row(f"a round, K={task.draft_len}, {kind}", *numbers, said, "")
    peer = part["transformers"]
    if "skipped" in peer:
        table.add_row("transformers", "", "", "", f"skipped: {peer['skipped']}", "")
    for kind in ("eager, dynamic cache", "compiled, static cache"):
        if kind in peer:
            over = f"{step / peer[kind]:.2f}"
            frames = f"{peer['compiled frames']} compiled frames" if kind.startswith("compiled") else ""
            table.add_row(f"transformers step, {kind}", f"{1e3 * peer[kind]:.2f}", "", over, frames, "")
    Console(width=max(150, Console().width)).print(table)


def _write(file: Path | None, said: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
