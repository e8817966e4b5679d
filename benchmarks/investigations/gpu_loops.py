"""What a GPU's loops and conditions cost: plain, fixed and adaptive decoding with loops in CUDA graphs, and without.

    python benchmarks/investigations/gpu_loops.py --size shipped --size 1b --json loops.json   # minutes of compiling
    python benchmarks/investigations/gpu_loops.py --size tiny          # a try on a CPU, where there are no graphs

By default the host waits for each condition of a loop. With `FLAG` XLA puts whole loops into a CUDA graph. It reads
flags once a process, so there is a process for each size and setting. They compile side by side, and then measure one
after the other: nothing else is on the device meanwhile.

Found on an H200: plain, fixed and adaptive decoding are 11 to 28% faster with `FLAG`, with the same tokens. A loop's
condition costs the host some 20 us without it; so plain rounds have one loop of their own (decode/loop.py), and
`specjax.profile` names the flag where a round without a draft takes more than 1.2 plain steps.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several share the card
sys.path.insert(0, str(Path(__file__).parents[1]))  # the other benchmarks' parts

import gpu
import jax
import jax.numpy as jnp
import numpy as np
import synthetic
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import specjax
from specjax import controllers, costs, models, stats, text
from specjax.costs import Profile
from specjax.profiling import measure
from specjax.types import Controller, Drafter, Generation, Model, PyTree

FLAG = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
FIXED, ACCEPTANCE = 3, 0.8
Run = Callable[[int, PyTree], Generation]


class Pair(NamedTuple):
    """A target and a drafter, and a prompt."""

    model: Model
    params: PyTree
    drafter: Drafter
    drafter_params: PyTree
    prompts: text.Prompts
    longest: int  # draft tokens of the adaptive controller

    def roles(self) -> tuple[Model, PyTree, Drafter, PyTree]:
        """What comes first wherever one decodes."""
        return self.model, self.params, self.drafter, self.drafter_params


class Beside:
    """Processes that do some things side by side, and some alone."""

    def __init__(self, folder: Path, name: str, count: int):
        self.folder, self.name, self.count = folder, name, count

    @contextlib.contextmanager
    def alone(self, phase: str) -> Iterator[None]:
        """Waits until all have come here, or ended; then for those who were first."""
        (self.folder / f"{self.name}.{phase}").touch()
        while len({file.stem for end in (phase, "ended") for file in self.folder.glob(f"*.{end}")}) < self.count:
            time.sleep(0.1)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def main(
    size: Annotated[list[str], typer.Option(help="shipped, 1b, 8b, tiny; may be given several times")] = ["shipped"],  # noqa: B006
    context: Annotated[int, typer.Option(help="tokens of the prompt")] = 64,
    max_new_tokens: int = 128,
    repeats: Annotated[int, typer.Option(help="paired runs; medians are reported")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prints a table."""
    if child:
        folder, name, count = json.loads(child)
        beside = Beside(Path(folder), name, count)
        found = _measure(_pair(size[0], context), context, max_new_tokens, repeats, beside)
        Path(folder, f"{name}.json").write_text(json.dumps(found))
        return
    settings = [(name, flags) for name in size for flags in ([""] if name == "tiny" else ["", FLAG])]
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, subprocess.Popen] = {}
        for name, flags in settings:
            own = f"{name}{' graphs' if flags else ''}"
            told = ["--context", context, "--max-new-tokens", max_new_tokens, "--repeats", repeats, "--size", name]
            told += ["--child", json.dumps([folder, own, len(settings)])]
            environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
            running[own] = subprocess.Popen([sys.executable, __file__, *map(str, told)], env=environment)
        while any(process.poll() is None for process in running.values()):
            for own, process in running.items():
                if process.poll() is not None:
                    Path(folder, f"{own}.ended").touch()
            time.sleep(0.1)
        files = {own: Path(folder, f"{own}.json") for own in running}
        found = {own: json.loads(file.read_text()) for own, file in files.items() if file.is_file()}
    _show(found)
    if json_file is not None:
        said = {"jax": jax.__version__, "context": context, "max_new_tokens": max_new_tokens, "repeats": repeats}
        json_file.write_text(json.dumps({**said, "found": found}, indent=1) + "\n")


def _pair(size: str, context: int) -> Pair:
    if size in ("shipped", "tiny"):
        name = "target" if size == "shipped" else "draft"
        target, draft = (models.load(models.PRETRAINED / each, dtype=jnp.float32) for each in (name, "draft"))
        drafter = specjax.drafters.draft_model(draft.model)
    else:
        key = jax.random.key(0)
        target = synthetic.successor({**gpu.LLAMA, **gpu.SHAPES[size]}, key, "bfloat16")
        draft = synthetic.successor({**gpu.LLAMA, **gpu.SHAPES["draft"]}, key, "bfloat16")
        drafter = synthetic.drafter(target.model.vocab_size, ACCEPTANCE, draft.model)
    tokenizer = Tokenizer.from_file(str(models.PRETRAINED / "target/tokenizer.json"))
    ids = tokenizer.encode(Path(__file__).read_text(encoding="utf-8")).ids  # real code
    prompts = text.Prompts(np.resize(np.asarray(ids, np.int32), (1, context)), np.full((1,), context, np.int32))
    return Pair(target.model, target.params, drafter, draft.params, prompts, 5 if size == "shipped" else FIXED)


def _measure(pair: Pair, context: int, most: int, repeats: int, beside: Beside) -> dict[str, Any]:
    options: dict[str, Any] = {"capacity": context + most}

    def plain(limit: int, state: PyTree) -> Generation:
        limits = np.full((1,), limit, np.int32)
        return specjax.autoregressive(pair.model, pair.params, *pair.prompts, max_new_tokens=limits, **options)

    def by(controller: Controller) -> Run:
        return lambda limit, state: specjax.generate(
            *pair.roles(), *pair.prompts, controller=controller, controller_state=state,
            max_new_tokens=np.full((1,), limit, np.int32), **options,
        )  # fmt: skip

    ways: dict[str, Run] = {"plain decoding": plain, f"fixed({FIXED})": by(controllers.fixed(FIXED))}
    states: dict[str, PyTree] = dict.fromkeys([*ways, "throughput"])
    wanted = [run(most, None).new_tokens() for run in ways.values()]
    profile = _profile(pair, context + most // 2, beside)
    ways["throughput"] = by(controllers.throughput(profile))
    for _ in range(3):
        out = jax.block_until_ready(ways["throughput"](most, states["throughput"]))
        states["throughput"] = out.controller_state
    times: dict[str, list[float]] = {name: [] for name in ways}
    with beside.alone("runs"):
        for name, run in ways.items():
            for limit in (most, 1, most, 1):  # the first runs of a program record its graphs
                _seconds(run, limit, states[name])
        for _ in range(repeats):
            for name, run in ways.items():
                times[name].append(_seconds(run, most, states[name]) - _seconds(run, 1, states[name]))
        last = {name: jax.block_until_ready(run(most, states[name])) for name, run in ways.items()}
    steps = times["plain decoding"]
    return {
        "device": jax.devices()[0].device_kind,
        "profile": profile.as_json(),
        "ways": {
            name: {
                "seconds": statistics.median(own),
                "speedup": statistics.median(a / b for a, b in zip(steps, own, strict=True)),
                "rounds": int(last[name].stats.rounds.sum()),
                "same_tokens": last[name].new_tokens() == wanted[0],
                "draft_lengths": [int(count) for count in stats.draft_lengths(last[name].stats)],
            }
            for name, own in times.items()
        },
    }


def _profile(pair: Pair, context: int, beside: Beside) -> Profile:
    """Timed alone, and compiled before."""

    @contextlib.contextmanager
    def busy(what: str) -> Iterator[None]:
        with beside.alone("profile") if what.startswith("timing") else contextlib.nullcontext():
            yield

    return measure.profile(*pair.roles(), contexts=(context,), longest=pair.longest, repeats=3, busy=busy)


def _seconds(run: Run, limit: int, state: PyTree) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(limit, state))
    return time.perf_counter() - begin


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"one row on {', '.join({each['device'] for each in found.values()})}; graphs: {FLAG}")
    for column in ("", "ms a round", "speed-up", "rounds by K", "a round by the profile, K = 0, 1, ... in plain steps"):
        table.add_column(column, justify="left" if not column else "right")
    for own, each in found.items():
        measured = costs.from_json(each["profile"]).costs[0]
        for name, way in each["ways"].items():
            same = "" if way["same_tokens"] else " (other tokens)"
            profiled = " ".join(f"{steps:.2f}" for steps in measured.in_steps()) if name.startswith("plain") else ""
            numbers = (f"{1e3 * way['seconds'] / way['rounds']:.3f}", f"{way['speedup']:.3f}")
            table.add_row(f"{own}, {name}{same}", *numbers, " ".join(map(str, way["draft_lengths"])), profiled)
    Console(width=max(130, Console().width)).print(table)


if __name__ == "__main__":
    typer.run(main)
