"""Measuring what rounds cost on this device: the table that `controllers.throughput` decides by."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

import specjax
from specjax import costs, integers, verify
from specjax.controllers.buckets import longest_draft, up_to
from specjax.costs import Costs, Profile
from specjax.decode import parts
from specjax.profiling.timed_loops import Bench, forced
from specjax.traced import refuse_traced
from specjax.types import Drafter, Model, Params, PyTree, Sampling, Setup, Verifier

_log = logging.getLogger(__name__)

Busy = Callable[[str], AbstractContextManager[Any]]


def profile(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    *,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int] = (128,),
    longest: int = 8,
    buckets: Sequence[int] | None = None,
    sampling: Sampling = Sampling(),
    verifier: Verifier | None = None,
    repeats: int = 9,
    cache: str | Path | None = None,
    busy: Busy | None = None,
) -> Profile:
    """Times whole rounds with a draft of 0 to K tokens, the drafting in them, and a plain step, on this device.

    Rounds are timed as `generate` runs them, in compiled loops, less what a call takes with its first round, in plain
    steps of the same turn: medians of `repeats` turns. That takes half a minute for one row of the shipped pair at one
    context on two cores; compiling comes before. Other work on the machine makes the numbers wrong: measure while it is
    quiet.

    Args:
      model, params: the target.
      drafter, drafter_params: what drafts.
      batch_sizes: rows at once; between them costs are interpolated. Give those that you will use.
      contexts: tokens in the cache; likewise.
      longest: K, the most that will be drafted.
      buckets: draft lengths that verification is compiled for, from 0 to K; default 0, 1, 2, 3, 5, 8, 16 ... K.
      sampling, verifier: as they will be used; filters and temperatures cost time. Default greedy, `rejection()`.
      repeats: of each measurement.
      cache: a folder. A profile of the same device, versions, shapes and settings that lies there is read instead of
        being measured, and a new one is kept there.
      busy: called with what is going on, for a spinner.

    Returns:
      A Profile, for `controllers.throughput` and `specjax.stats`; `.save(path)` writes it, `costs.load(path)` reads it.

    Raises:
      ValueError: an argument is wrong; the message says what to do.

    >>> import jax, specjax
    >>> from specjax import testing
    >>> model, table = testing.table_model(1, 8), testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> found = specjax.profile(model, table, specjax.drafters.draft_model(model), table, longest=2, repeats=1)
    >>> len(found.costs[0].rounds)
    3
    """
    parts.check_kinds(model, drafter, verifier)
    repeats, longest = integers.static(repeats, "repeats"), longest_draft(longest, "longest")
    refuse_traced("profile runs", "call it outside jit.", (params, drafter_params))
    named = up_to(longest) if buckets is None else buckets
    chosen = tuple(map(int, named)) if _are_whole(named) else ()
    if not chosen or chosen != tuple(sorted(set(chosen))) or chosen[0] != 0 or chosen[-1] != longest:
        raise ValueError(f"buckets must ascend from 0 to longest={longest}, got {buckets!r}.")
    _check_counts(batch_sizes, "batch_sizes, rows at once,", "(1, 4)")
    _check_counts(contexts, "contexts, tokens in the cache,", "(64, 1024)")
    most = model.max_positions
    if most is not None and max(contexts) + 2 * (longest + 1) >= most:
        raise ValueError(
            f"contexts go up to {max(contexts)}, and two rounds of {longest + 1} tokens are timed after them, but the "
            f"target has places for {most} tokens: name shorter ones."
        )
    setup = Setup(model, drafter, verifier or verify.rejection(), forced(chosen), max(contexts))
    parts.check_fit(setup, sampling)
    setting = {
        "batch_sizes": list(batch_sizes), "contexts": list(contexts), "buckets": list(chosen),
        "sampling": str(sampling), "verifier": _name(setup.verifier.verify), "drafter": _name(drafter.propose),
        "repeats": repeats,
    }  # fmt: skip
    versions = {"specjax": specjax.__version__, "jax": jax.__version__, "format": str(costs.FORMAT)}
    about = {**versions, **{name: str(value) for name, value in setting.items()}}
    file = None
    if cache is not None:
        file = Path(cache).expanduser() / f"{_digest(about, params, drafter_params)}.json"
        kept = _kept(file)
        if kept is not None:
            return kept
    found: list[Costs] = []
    busy = busy or (lambda what: nullcontext())
    for batch in sorted(set(batch_sizes)):
        bench = Bench(setup, Params(params, drafter_params), sampling, batch)
        with busy(f"compiling the loops to time, batch {batch}"):
            bench.compile(min(contexts))
        for context in sorted(set(contexts)):
            with busy(f"timing rounds, batch {batch}, {context} tokens in the cache"):
                found.append(bench.time(context, repeats))
    result = Profile(jax.devices()[0].device_kind, chosen, tuple(found), tuple(about.items()))
    costs.check(result)
    odd = [c for c in found if c.rounds[0] > 1.2 * c.plain]
    if odd:
        _log.warning(
            "a round without a draft took %.1f plain steps (batch %d), not one. Was there other work? Measure again. "
            "On a GPU try XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL, which waits less for loops.",
            odd[0].rounds[0] / odd[0].plain, odd[0].batch,
        )  # fmt: skip
    if file is not None:
        result.save(file)
    return result


def _check_counts(values: Any, name: str, example: str) -> None:
    if not _are_whole(values) or min(values) < 1:
        raise ValueError(f"{name} must be whole numbers from 1 on, as in {example}; got {values!r}.")


def _are_whole(values: Any) -> bool:
    """Whether it is a list, or the like, of one or more whole numbers."""
    kinds = {type(x) for x in values} if isinstance(values, Sequence) else set()
    return bool(kinds) and all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds)


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _digest(about: dict[str, str], params: PyTree, drafter_params: PyTree) -> str:
    """Tells profiles apart: by device, versions, settings, and the shapes of all parameters."""
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", (params, drafter_params))
    said = json.dumps([jax.devices()[0].device_kind, jax.device_count(), about, str(shapes)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _kept(file: Path) -> Profile | None:
    try:
        found = costs.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("measuring again: %s", error)
        return None
    _log.info("profile of %s read from %s", found.device, file)
    return found
