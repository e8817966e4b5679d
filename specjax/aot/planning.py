"""Plans a pod: does the generation fit, what are the compiler's cost estimates, which collectives run between chips."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from specjax.aot import hlo, programs
from specjax.aot.costs import Cost, costs, part_of
from specjax.aot.programs import Arguments, Compiled, Workload
from specjax.aot.shapes import Shaped
from specjax.aot.topology import bytes_per_cycle, default_axes, hbm_bytes, make_mesh
from specjax.dtypes import floating
from specjax.sharding import Layout, layout


class Collective(NamedTuple):
    """The communication between chips in one round, of one kind and for one part."""

    part: str
    kind: str  # "all-reduce", say
    times: int
    bytes: int  # of the results, per chip
    per_layer: float | None  # times, divided by the layers and passes of that model; None if the part is no model


class Report(NamedTuple):
    """What `plan` found."""

    target: str
    draft: str
    topology: str
    mesh: dict[str, int]
    batch: int
    capacity: int
    draft_len: int
    prompt_width: int
    dtype: str
    fits: bool
    hbm: float  # bytes of a chip that programs may use
    needed: int  # bytes per chip of the largest program
    programs: list[Compiled]
    costs: dict[str, Cost]  # by share of the cache that is live; empty where a loop does not fit
    collectives: list[Collective]
    kernels: int  # calls of specjax's own kernels in a round, for which the compiler makes no estimate

    @property
    def seconds(self) -> float:
        """Compile time of all programs together."""
        return sum(item.seconds for item in self.programs)


def plan(
    target: Shaped,
    draft: Shaped,
    topology: str,
    *,
    batch: int = 8,
    capacity: int = 4096,
    draft_len: int = 4,
    prompt_width: int = 128,
    dtype: str = "bfloat16",
    axes: dict[str, int] | None = None,
    prefill: bool = True,
) -> Report:
    """Compiles a generation for TPUs, without a TPU, and reads the result.

    Args:
      target, draft: shapes of the models; see `specjax.shapes.shaped`.
      topology: "v5e:2x2", say: v5e, v5p and v6e, up to 256 chips.
      batch: rows.
      capacity: tokens that a row may hold, prompt included.
      draft_len: K.
      prompt_width: P, of the padded prompts.
      dtype: of parameters and caches.
      axes: mesh axes and their sizes, among data (rows), model (heads) and sub (what else can be cut, beside model).
        None: all chips for the model.
      prefill: whether to compile reading the prompts too.

    Returns:
      A Report. The loops are compiled with all their layers. The report says if a program is too large; no error.

    Raises:
      ValueError: an unknown topology, a mesh that is not the topology's, heads or rows that do not divide over it.
      ImportError: no libtpu.
    """
    work = workload(
        target, draft, topology, batch=batch, capacity=capacity, draft_len=draft_len, prompt_width=prompt_width,
        dtype=dtype, axes=axes,
    )  # fmt: skip
    given = programs.arguments(work)
    rounds, plain = programs.compile_rounds(work, given), programs.compile_plain(work, given)
    prompts = programs.compile_prefill(work, given) if prefill else None
    return report(work, given, topology, dtype, rounds, plain, prompts)


def report(
    work: Workload,
    given: Arguments,
    topology: str,
    dtype: str,
    rounds: Compiled,
    plain: Compiled,
    prefill: Compiled | None = None,
) -> Report:
    """The report on these programs of one workload; see `plan`."""
    done = [item for item in (rounds, plain, prefill) if item is not None]
    hbm = hbm_bytes(topology)
    needed = max(item.memory.peak if item.memory else item.needed or 0 for item in done)
    return Report(
        target=work.target.name, draft=work.draft.name, topology=topology, mesh=dict(work.layout.mesh.shape),
        batch=work.batch, capacity=work.capacity, draft_len=work.draft_len, prompt_width=work.prompt_width, dtype=dtype,
        fits=all(item.memory is not None for item in done) and needed <= hbm, hbm=hbm, needed=needed, programs=done,
        costs=costs(work, given, rounds, plain, bytes_per_cycle(topology)), collectives=collectives(rounds, work),
        kernels=kernels(rounds),
    )  # fmt: skip


def workload(
    target: Shaped,
    draft: Shaped,
    topology: str,
    *,
    batch: int,
    capacity: int,
    draft_len: int,
    prompt_width: int,
    dtype: str,
    axes: dict[str, int] | None,
) -> Workload:
    """The same arguments, checked against each other; see `plan`."""
    if target.built.model.vocab_size != draft.built.model.vocab_size:
        raise ValueError(
            f"draft and target vocabularies differ: {draft.name} has {draft.built.model.vocab_size} ids, {target.name} "
            f"{target.built.model.vocab_size}. A draft model needs the target's tokenizer."
        )
    if prompt_width > capacity:
        raise ValueError(f"prompts of {prompt_width} tokens do not fit a capacity of {capacity}.")
    there = layout(make_mesh(topology, axes or default_axes(topology, target.kv_heads, draft.kv_heads)))
    for part in (target, draft):
        _check_divides(part.name, "key/value heads", part.kv_heads, there, ("model",))
        _check_divides(part.name, "query heads", part.heads, there, there.width)
    _check_divides("the batch", "rows", batch, there, there.rows)
    return Workload(target.on(there), draft.on(there), there, batch, capacity, draft_len, prompt_width, floating(dtype))


def collectives(rounds: Compiled, work: Workload) -> list[Collective]:
    """The collectives of one round; [] where the loop does not fit."""
    if rounds.program is None:
        return []
    # The draft model's first pass stands before its loop; its passes are K in all.
    passes = {"target": work.target.layers, "draft": work.draft.layers * work.draft_len}
    counts, sizes = Counter(), Counter()
    for step, times in rounds.program.timed(rounds.program.loop_body()):
        kind = hlo.collective_kind(step.instruction)
        if kind is not None:
            counts[part_of(step.instruction), kind] += times
            sizes[part_of(step.instruction), kind] += times * hlo.collective_bytes(step.instruction)
    return [
        Collective(part, kind, count, sizes[part, kind], count / passes[part] if part in passes else None)
        for (part, kind), count in sorted(counts.items())
    ]


def kernels(rounds: Compiled) -> int:
    """Calls of specjax's own kernels in one round; 0 where the loop does not fit."""
    if rounds.program is None:
        return 0
    turns = rounds.program.timed(rounds.program.loop_body())
    return sum(item.times for item in turns if hlo.is_kernel(item.step.instruction))


def _check_divides(whose: str, what: str, count: int, given: Layout, axes: tuple[str, ...]) -> None:
    sizes = [given.mesh.shape[axis] for axis in axes]
    size = math.prod(sizes)
    if count % size:
        shown = " x ".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))
        raise ValueError(
            f"{whose}: {count} {what} do not divide over {shown} = {size} chips. Choose other sizes with --mesh: model "
            "must divide the key/value heads of both models, model x sub their query heads, data the batch."
        )
