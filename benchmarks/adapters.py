"""What adapting a module costs: one and the same network as specjax's own and as somebody's Flax module, in every way
that the adapter knows to use its cache.

    python benchmarks/adapters.py --repeats 5

The shipped pair's weights, float32, greedy, one draft model for all. Repetitions run all contenders in turn; medians.
All must emit the same tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax_llama import with_weights_of
from prompts import code_prompts
from rich.console import Console
from rich.table import Table

import specjax
from specjax import adapters, controllers, drafters, models, text


def main(
    max_new_tokens: int = 128,
    capacity: Annotated[int, typer.Option(help="tokens that a row may hold")] = 256,
    batch: int = 1,
    draft_len: int = 3,
    repeats: int = 5,
) -> None:
    """Measures and prints a table."""
    target, draft = (models.load(models.PRETRAINED / part, dtype=jnp.float32) for part in ("target", "draft"))
    config = json.loads((models.PRETRAINED / "target" / "config.json").read_text(encoding="utf-8"))
    module = with_weights_of(target, config)
    contenders: dict[str, tuple[Any, Any]] = {"specjax's own": (target.model, target.params)}
    for strategy in adapters.Strategy:
        adapted = adapters.from_nnx(module, strategy=strategy)
        contenders[f"adapted, {strategy}"] = (adapted.model, adapted.params)
    ids = code_prompts(text.load_tokenizer(models.PRETRAINED / "target"), batch)
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "capacity": capacity}
    drafter = drafters.draft_model(draft.model)

    def plain(model, params):
        return specjax.autoregressive(model, params, *ids, **common)

    def speculative(model, params):
        return specjax.generate(
            model, params, drafter, draft.params, *ids, controller=controllers.fixed(draft_len), **common
        )

    wanted = plain(*contenders["specjax's own"]).new_tokens()
    seconds: dict[tuple[str, str], list[float]] = {}
    for name, parts in contenders.items():
        for run in (plain, speculative):
            assert run(*parts).new_tokens() == wanted, (name, run.__name__)
    for _ in range(repeats):
        for name, parts in contenders.items():
            for run in (plain, speculative):
                start = time.perf_counter()
                jax.block_until_ready(run(*parts))
                seconds.setdefault((name, run.__name__), []).append(time.perf_counter() - start)
    tokens = sum(map(len, wanted))
    table = Table(
        "contender", "plain, tokens/s", f"K = {draft_len}, tokens/s", "speed-up", "plain, times specjax's own"
    )
    for name in contenders:
        slow, fast = (statistics.median(seconds[name, run]) for run in ("plain", "speculative"))
        own = statistics.median(seconds["specjax's own", "plain"])
        table.add_row(name, f"{tokens / slow:.0f}", f"{tokens / fast:.0f}", f"{slow / fast:.2f}", f"{slow / own:.2f}")
    Console().print(
        f"{batch} rows, {max_new_tokens} new tokens, capacity {capacity}, {jax.devices()[0].device_kind}", table
    )


if __name__ == "__main__":
    typer.run(main)
