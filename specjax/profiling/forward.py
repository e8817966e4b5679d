"""The time of one forward pass over T tokens, inside a compiled loop: no prefill, no sampling, no call from Python."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from specjax.decode.prefill import prefill
from specjax.profiling.paired_timing import in_turn
from specjax.types import Model


def time_pass(
    model: Model, params: Any, *, tokens: int, live: int, batch: int = 1, passes: int = 16, repeats: int = 5
) -> float:
    """Seconds of a pass over `tokens` tokens a row with `live` in the cache, all logits included: the median."""
    options: dict[str, int] = {"live": live, "batch": batch, "passes": passes, "repeats": repeats}
    return statistics.median(time_passes(model, params, widths=(tokens,), **options)[0])


def time_passes(
    model: Model,
    params: Any,
    *,
    widths: Sequence[int],
    live: int,
    batch: int = 1,
    passes: int = 16,
    repeats: int = 5,
) -> list[list[float]]:
    """Seconds of a pass over each of `widths` tokens a row, `repeats` times in turn: [widths][repeats].

    Each is the difference between 2 * passes and passes passes in one loop, over `passes`. Each pass reads the last
    one's most likely tokens, so that none can be left out. With no repeats everything is compiled, nothing measured.
    """
    prompts = jax.random.randint(jax.random.key(0), (batch, live), 0, model.vocab_size, jnp.int32)
    cache = _fill(model, live + max(widths), params, prompts)
    blocks = [jnp.zeros((batch, width), jnp.int32) for width in widths]
    run = functools.partial(_time, model, params, cache)
    for block in blocks:
        run(block, passes)  # compiles

    def seconds(block: jax.Array) -> float:
        return (run(block, 2 * passes) - run(block, passes)) / passes

    timed = in_turn({place: functools.partial(seconds, block) for place, block in enumerate(blocks)}, repeats)
    return list(timed.values())


def _time(model: Model, params: Any, cache: Any, ids: jax.Array, count: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(_loop(model, params, cache, ids, jnp.int32(count)))
    return time.perf_counter() - start


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill(model: Model, slots: int, params: Any, prompts: jax.Array) -> Any:
    batch, live = prompts.shape
    cache = model.init_cache(params, batch, slots)
    return prefill(model, params, prompts, jnp.full((batch,), live, jnp.int32), cache).cache


@functools.partial(jax.jit, static_argnums=0)
def _loop(model: Model, params: Any, cache: Any, ids: jax.Array, count: jax.Array) -> jax.Array:
    def body(_, ids: jax.Array) -> jax.Array:
        out = model.apply(params, ids, cache, model.init_block(params, *ids.shape))
        return jnp.argmax(out.logits[..., : model.vocab_size], -1).astype(jnp.int32)

    return lax.fori_loop(0, count, body, ids)
