"""A healthy environment, a self-check that pays, and what a terminal of 100 columns shows of a report."""

from __future__ import annotations

import io

from rich.console import Console

from specjax.cli.doctor import environment
from specjax.cli.doctor.environment import Device, Devices, Package
from specjax.cli.doctor.self_check import Pace

HEALTHY = environment.Environment(
    version="0.1.0",
    folder="/somewhere/specjax",
    packages=[
        Package("jax", "0.10.2", "0.8.2"),
        Package("jaxlib", "0.10.2", None),
        Package("flax", "0.12.10", "0.12.1"),
    ],
    host=environment.Host("Linux 6.1 x86_64", "3.12.1", "A processor", 8, 32 * 2**30),
    hardware={},
    devices=Devices("cpu", [Device("cpu", "cpu", 1, None)], None, {}),
    settings=dict.fromkeys(environment.settings()),
    programs=environment.Programs("/home/me/.cache/specjax/xla", 3, 5 * 2**20, True),
)

PACE = Pace(
    draft_len=3, step_seconds=1e-3, round_seconds=2e-3, round_cost=2.0, pass_cost=1.5, tokens_per_round=3.0,
    acceptance=0.7, speedups=[1.4, 1.5, 1.6], dtype="float32",
)  # fmt: skip


def shown(parts) -> str:
    console = Console(file=io.StringIO(), width=100)
    for part in parts:
        console.print(part)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
