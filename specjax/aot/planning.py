"""A plan of a pod: does the generation fit, what does the compiler think it costs, what do chips tell each other."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from specjax import hlo
from specjax.aot import programs
from specjax.aot.programs import DRAFT, TARGET, WRITE, Compiled, Workload
from specjax.aot.topology import bytes_per_cycle, default_axes, hbm_bytes, make_mesh
from specjax.pair import floating
from specjax.shapes import Shaped
from specjax.sharding import Layout, layout
from specjax.tpu.attention import NAME as ATTENTION

REST = "laws, sampling, bookkeeping"
PARTS = {TARGET: "target", DRAFT: "draft", WRITE: "cache write", REST: REST}
# How much of the cache is live: all of it, and an eighth.
HALVINGS = {"full": 0, "eighth": 3}


class Cost(NamedTuple):
    """The compiler's estimates in cycles of one chip, with one share of the cache live.

    For ranking only: they know nothing of collectives and asynchronous copies. Of specjax's own kernels the compiler
    makes none: counted instead is what they move, at the rate of main memory.
    """

    round_by_part: dict[str, int]
    step_by_part: dict[str, int]
    round_counted: int  # of the round's cycles, those counted for kernels
    step_counted: int

    @property
    def round(self) -> int:
        """Of one round of speculation."""
        return sum(self.round_by_part.values())

    @property
    def step(self) -> int:
        """Of one autoregressive step."""
        return sum(self.step_by_part.values())

    @property
    def steps_per_round(self) -> float:
        """Speculation gains where a round emits more tokens than this."""
        return self.round / self.step

    @property
    def verification(self) -> float:
        """A target pass over K+1 tokens, in passes over one."""
        return self.round_by_part["target"] / self.step_by_part["target"]


class Collective(NamedTuple):
    """What chips tell each other in one round, of one kind and for one part."""

    part: str
    kind: str  # "all-reduce", say
    times: int
    bytes: int  # of the results, per chip
    per_layer: float | None  # times over the layers and passes of that model; None where no model is at work


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
        """Of the compiler, all programs together."""
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
    """Compiles a generation for TPUs that need not be at hand, and reads the result.

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
      A Report. The loops are compiled with all their layers; too large a program is a fact in it, not an error.

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
    return report(work, topology, dtype, rounds, plain, programs.compile_prefill(work, given) if prefill else None)


def report(
    work: Workload, topology: str, dtype: str, rounds: Compiled, plain: Compiled, prefill: Compiled | None = None
) -> Report:
    """What these programs of one workload say; see `plan`."""
    done = [item for item in (rounds, plain, prefill) if item is not None]
    hbm = hbm_bytes(topology)
    needed = max(item.memory.peak if item.memory else item.needed or 0 for item in done)
    return Report(
        target=work.target.name, draft=work.draft.name, topology=topology, mesh=dict(work.layout.mesh.shape),
        batch=work.batch, capacity=work.capacity, draft_len=work.draft_len, prompt_width=work.prompt_width, dtype=dtype,
        fits=all(item.memory is not None for item in done) and needed <= hbm, hbm=hbm, needed=needed, programs=done,
        costs=costs(rounds, plain, bytes_per_cycle(topology)), collectives=collectives(rounds, work),
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


def costs(rounds: Compiled, plain: Compiled, rate: float) -> dict[str, Cost]:
    """For each share of the cache in HALVINGS; none where one of the loops does not fit. `rate` is in bytes a cycle."""
    if rounds.program is None or plain.program is None:
        return {}
    found = {}
    for share, halvings in HALVINGS.items():
        parts = [by_part(program, halvings) for program in (rounds.program, plain.program)]
        counted = [kernels_by_part(program, halvings, rate) for program in (rounds.program, plain.program)]
        a_round, a_step = (
            {part: some[part] + more[part] for part in some} for some, more in zip(parts, counted, strict=True)
        )
        found[share] = Cost(a_round, a_step, sum(counted[0].values()), sum(counted[1].values()))
    return found


def collectives(rounds: Compiled, work: Workload) -> list[Collective]:
    """Of one round; [] where the loop does not fit."""
    if rounds.program is None:
        return []
    # The draft model's first pass stands before its loop; its passes are K in all.
    passes = {"target": work.target.layers, "draft": work.draft.layers * work.draft_len}
    counts, sizes = Counter(), Counter()
    for step, times in rounds.program.timed(rounds.program.loop_body()):
        kind = hlo.collective_kind(step.instruction)
        if kind is not None:
            counts[_part(step.instruction), kind] += times
            sizes[_part(step.instruction), kind] += times * hlo.collective_bytes(step.instruction)
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


def by_part(program: hlo.Program, halvings: int) -> dict[str, int]:
    """Estimated cycles of one turn of the loop, for each of PARTS."""
    found = dict.fromkeys(PARTS.values(), 0)
    for item in program.timed(program.loop_body(), halvings=halvings):
        found[_part(item.step.instruction)] += item.cycles
    return found


def kernels_by_part(program: hlo.Program, halvings: int, rate: float) -> dict[str, int]:
    """The same for specjax's own kernels: the bytes that they move, at `rate` bytes a cycle."""
    found = dict.fromkeys(PARTS.values(), 0)
    for item in program.timed(program.loop_body(), halvings=halvings):
        instruction = item.step.instruction
        # Attention says what it moves with the cache full; a write moves the same always.
        share = 2 ** -(halvings if instruction.name.startswith(ATTENTION) else 0)
        found[_part(instruction)] += int(item.times * instruction.kernel_bytes * share / rate)
    return found


def _part(item: hlo.Instruction) -> str:
    return next((shown for label, shown in PARTS.items() if label in item.scope), REST)


def _check_divides(whose: str, what: str, count: int, given: Layout, axes: tuple[str, ...]) -> None:
    sizes = [given.mesh.shape[axis] for axis in axes]
    size = math.prod(sizes)
    if count % size:
        shown = " x ".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True))
        raise ValueError(
            f"{whose}: {count} {what} do not divide over {shown} = {size} chips. Choose other sizes with --mesh: model "
            "must divide the key/value heads of both models, model x sub their query heads, data the batch."
        )
