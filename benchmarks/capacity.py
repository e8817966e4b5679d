"""Does the cost follow the live length, or the buffer's capacity? The same generation with a small and a large buffer.

    python benchmarks/capacity.py --repeats 15

The shipped pair, one row. Every repetition runs both capacities in turn, so that a busy machine slows both alike; the
median of the paired ratios is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

import specjax
from specjax import controllers, drafters, models
from specjax.types import Generation


def main(
    small: Annotated[int, typer.Option(help="tokens that the small buffer holds")] = 1024,
    large: Annotated[int, typer.Option(help="tokens that the large buffer holds")] = 16384,
    prompt: Annotated[int, typer.Option(help="tokens of the prompt: the live length begins here")] = 448,
    max_new_tokens: int = 100,
    draft_len: int = 5,
    repeats: Annotated[int, typer.Option(help="paired repetitions")] = 15,
) -> None:
    """Measures and prints a table."""
    target, draft = (models.load(models.PRETRAINED / part, dtype=jnp.float32) for part in ("target", "draft"))
    ids = jax.random.randint(jax.random.key(0), (1, prompt), 2, target.model.vocab_size, jnp.int32)

    def plain(capacity: int) -> Generation:
        return specjax.autoregressive(
            target.model, target.params, ids, max_new_tokens=max_new_tokens, capacity=capacity
        )

    def speculative(capacity: int) -> Generation:
        return specjax.generate(
            target.model, target.params, drafters.draft_model(draft.model), draft.params, ids,
            max_new_tokens=max_new_tokens, capacity=capacity, controller=controllers.fixed(draft_len),
        )  # fmt: skip

    table = Table("generation", f"ms, capacity {small}", f"ms, capacity {large}", "ratio", "least to most")
    for name, run in {"autoregressive": plain, f"speculative K={draft_len}": speculative}.items():
        pairs = [[_seconds(run, capacity) for capacity in (small, large)] for _ in range(repeats + 1)][1:]
        ratios = sorted(slow / fast for fast, slow in pairs)
        medians = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        table.add_row(name, *(f"{ms:.0f}" for ms in medians), f"{statistics.median(ratios):.2f}", spread)
    Console().print(f"{prompt} to {prompt + max_new_tokens} live tokens, {jax.devices()[0].device_kind}", table)


def _seconds(run: Callable[[int], Generation], capacity: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(capacity))
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
