"""Seconds to trace and to compile a generation, by size of the models, on this machine's backend; nothing is run.

    python benchmarks/compile_seconds.py --pair llama-1b,llama-100m --pair llama-8b,llama-1b

Whole models by their shapes alone, so any size compiles anywhere. Seconds are of the processor (compilers use several
cores, machines are shared), wall seconds in brackets. The first column traces and lowers the loop of rounds; the others
compile, with lowering again and whatever is not yet traced. Caches of compiled programs are not in use.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.table import Table

from specjax.aot import programs
from specjax.aot.shapes import shaped
from specjax.dtypes import floating
from specjax.sharding import layout, make_mesh

_PAIRS = ["llama-100m,llama-100m", "llama-1b,llama-100m", "llama-8b,llama-1b", "llama-70b,llama-1b"]


def main(
    pair: Annotated[list[str], typer.Option(help="target,draft: named shapes or folders")] = _PAIRS,
    dtype: str = "float32",
    capacity: int = 4096,
    prompt_width: int = 128,
    draft_len: int = 4,
) -> None:
    """Compiles and prints a table."""
    table = Table("target, draft", "layers", "trace and lower", "prompts", "rounds", "plain decoding")
    for names in pair:
        target, draft = (shaped(name) for name in names.split(","))
        there = layout(make_mesh(model=1))
        work = programs.Workload(
            target.on(there), draft.on(there), there, 1, capacity, draft_len, prompt_width, floating(dtype)
        )
        given = programs.arguments(work)
        state = programs.rounds_state(work, given)
        parts = [functools.partial(programs.lower_rounds, given, state)]
        compilers = (programs.compile_prefill, programs.compile_rounds, programs.compile_plain)
        parts += [functools.partial(compiler, work, given) for compiler in compilers]
        table.add_row(names, f"{target.layers} + {draft.layers}", *map(_timed, parts))
        jax.clear_caches()
    Console().print(f"processor seconds (wall seconds), {jax.devices()[0].device_kind}, {dtype}", table)


def _timed(run: Callable[[], Any]) -> str:
    began, processor = time.perf_counter(), time.process_time()
    run()
    return f"{time.process_time() - processor:.1f} ({time.perf_counter() - began:.1f})"


if __name__ == "__main__":
    typer.run(main)
