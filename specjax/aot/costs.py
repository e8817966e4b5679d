"""Costs of a round and of a step on a described chip: the compiler's estimates, and a lower bound from bytes.

The estimate leaves out weights that are prefetched, and a good program prefetches most of them. So the estimate of a
pass may be less than the time that main memory needs for its bytes. Each model's passes cost the larger of both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from specjax.aot import hlo
from specjax.aot.programs import DRAFT, TARGET, WRITE, Arguments, Compiled, Workload
from specjax.kernels.attention import NAME as ATTENTION
from specjax.profiling import roofline

REST = "probabilities, sampling, bookkeeping"
PARTS = {TARGET: "target", DRAFT: "draft", WRITE: "cache write", REST: REST}
# How much of the cache is live: all of it, and an eighth.
HALVINGS = {"full": 0, "eighth": 3}


class Turn(NamedTuple):
    """One turn of a loop, a round or a step, in cycles of one chip by part."""

    estimated: dict[str, int]  # by the compiler, but for specjax's own kernels
    counted: dict[str, int]  # of those kernels: for the bytes that they move, at the rate of main memory
    least: dict[str, int]  # for the bytes that the passes of a model must read and write, at that rate

    @property
    def by_part(self) -> dict[str, int]:
        """The larger of both, for each of PARTS."""
        return {part: max(self.estimated[part] + self.counted[part], self.least[part]) for part in self.estimated}

    @property
    def all(self) -> int:
        """The sum."""
        return sum(self.by_part.values())


class Cost(NamedTuple):
    """Costs of a round and of a step with one share of the cache live. For ranking only: without collectives."""

    round: Turn
    step: Turn

    @property
    def steps_per_round(self) -> float:
        """Speculation gains where a round emits more tokens than this."""
        return self.round.all / self.step.all

    @property
    def verification(self) -> float:
        """A target pass over K+1 tokens, in passes over one."""
        return self.round.by_part["target"] / self.step.by_part["target"]


def costs(work: Workload, given: Arguments, rounds: Compiled, plain: Compiled, rate: float) -> dict[str, Cost]:
    """For each share of the cache in HALVINGS; none where one of the loops does not fit. `rate` is in bytes a cycle."""
    if rounds.program is None or plain.program is None:
        return {}
    found = {}
    for share, halvings in HALVINGS.items():
        live = {"batch": _rows_of_a_chip(work), "live": work.capacity / 2**halvings}
        target = given.setup.model, given.params.target
        draft = work.draft.built.model, given.params.drafter
        *drafting, verification = roofline.speculation(*target, *draft, draft_len=work.draft_len, **live)
        least = {"target": least_cycles(work, [verification], rate), "draft": least_cycles(work, drafting, rate)}
        a_step = {"target": least_cycles(work, roofline.step(*target, **live), rate)}
        found[share] = Cost(turn(rounds.program, halvings, rate, least), turn(plain.program, halvings, rate, a_step))
    return found


def turn(program: hlo.Program, halvings: int, rate: float, least: dict[str, int]) -> Turn:
    """One turn of a program's loop; `least` for the parts that have one."""
    estimated, counted = (dict.fromkeys(PARTS.values(), 0) for _ in range(2))
    for item in program.timed(program.loop_body(), halvings=halvings):
        part = part_of(item.step.instruction)
        estimated[part] += item.cycles
        counted[part] += kernel_cycles(item, halvings, rate)
    return Turn(estimated, counted, dict.fromkeys(PARTS.values(), 0) | least)


def kernel_cycles(item: hlo.Timed, halvings: int, rate: float) -> int:
    """Cycles that one of specjax's own kernels needs for the bytes that it declares; 0 for other instructions."""
    instruction = item.step.instruction
    # Attention declares its bytes for a full cache; a write always moves the same.
    share = 2 ** -(halvings if instruction.name.startswith(ATTENTION) else 0)
    return int(item.times * instruction.kernel_bytes * share / rate)


def least_cycles(work: Workload, passes: list[roofline.Work], rate: float) -> int:
    """Cycles for the bytes of these passes, counted for the rows of one chip, on each chip that holds a part."""
    return int(roofline.total(passes).bytes / _ways(work, work.layout.width) / rate)


def part_of(item: hlo.Instruction) -> str:
    """Which of PARTS an instruction belongs to."""
    return next((shown for label, shown in PARTS.items() if label in item.scope), REST)


def _rows_of_a_chip(work: Workload) -> int:
    return work.batch // _ways(work, work.layout.rows)


def _ways(work: Workload, axes: tuple[str, ...]) -> int:
    return math.prod(work.layout.mesh.shape[axis] for axis in axes)
