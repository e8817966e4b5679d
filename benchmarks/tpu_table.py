"""What TPUs would make of a generation, with none at hand: five pairs of models and pods, as a Markdown table.

    python benchmarks/tpu_table.py --json tpu.json

Each row is `specjax compile` on whole models: batch 8, capacity 4096, 4 draft tokens, bfloat16. Rounds and steps are in
million cycles, for ranking: the compiler's own estimate, or what the bytes of a model's passes take where that is more.
Seconds are of the processor, since machines are shared. A case takes minutes; each is written down as soon as it is
known.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

CASES = [
    ("llama-1b", "llama-100m", "v5e:1x1"),
    ("llama-8b", "llama-1b", "v5e:2x2"),
    ("llama-70b", "llama-1b", "v5e:4x4"),
    ("llama-8b", "llama-1b", "v6e:2x2"),
    ("llama-70b", "llama-1b", "v5p:2x2x2"),
]
_HEADER = (
    "| target + draft | chips | GiB a chip, of | round | step | round / step, cache full | an eighth full "
    "| pass over 5 / 1, full | an eighth | all-reduces per layer | compile, CPU s |"
)


def main(
    only: Annotated[list[int] | None, typer.Option(help="cases by number, from 0; default all")] = None,
    prefill: Annotated[bool, typer.Option(help="compile the reading of prompts too")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="where to write the numbers")] = None,
) -> None:
    """Prints a row per case."""
    from specjax import aot
    from specjax.aot import shapes
    from specjax.cli import plan_display

    for name, value in {**aot.ENVIRONMENT, "JAX_PLATFORMS": "cpu"}.items():
        os.environ.setdefault(name, value)
    print(_HEADER)
    print("|---" * _HEADER.count(" | ") + "|---|")
    found = []
    for index in only or range(len(CASES)):
        target, draft, topology = CASES[index]
        began = time.process_time()
        report = aot.plan(shapes.shaped(target), shapes.shaped(draft), topology, prefill=prefill)
        seconds = time.process_time() - began
        print(_row(report, seconds), flush=True)
        found.append({**plan_display.as_json(report), "processor_seconds": seconds})
        if json_path:
            json_path.write_text(json.dumps(found, indent=1))


def _row(report, seconds: float) -> str:
    from specjax.aot.topology import GIB

    names = f"{report.target} + {report.draft} | {report.topology}"
    room = f"{report.needed / GIB:.2f}, {report.hbm / GIB:.2f}"
    if not report.costs:
        return f"| {names} | {room}: does not fit" + " |" * 8 + f" {seconds:.0f} |"
    full, short = report.costs["full"], report.costs["eighth"]
    reduces = [item for item in report.collectives if item.kind == "all-reduce" and item.per_layer is not None]
    per_layer = ", ".join(f"{item.part} {item.per_layer:.2f}" for item in reduces) or "none"
    return (
        f"| {names} | {room} | {full.round.all / 1e6:.1f} | {full.step.all / 1e6:.1f} | {full.steps_per_round:.2f} "
        f"| {short.steps_per_round:.2f} | {full.verification:.2f} | {short.verification:.2f} | {per_layer} "
        f"| {seconds:.0f} |"
    )


if __name__ == "__main__":
    typer.run(main)
