"""A reader of optimised HLO text: what a compiled program runs, inside which loops, and what it moves.

It visits only instructions that run as separate operations: the inside of a fusion makes no result in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ENTERED = {"while", "call", "conditional", "async-start"}
# Operations whose result is another operation's.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "opt-barrier",
}
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?"
)
_HOST_OPS = {"infeed", "outfeed", "send", "send-done", "recv", "recv-done"}
_HOST_TEXT = re.compile(r"callback|stablehlo\.(?:infeed|outfeed|send|recv)\b", re.IGNORECASE)


class Shape(NamedTuple):
    """An array, per chip."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a memory space of its own (VMEM on TPUs), not in the chip's main memory

    @property
    def bytes(self) -> int:
        """Its bytes, without the padding of tiles."""
        width = re.search(r"\d+", self.dtype)  # f32, bf16, f8e4m3fn; pred and token have none
        return math.prod(self.dims) * (int(width[0]) if width else 8) // 8


class Instruction(NamedTuple):
    """One line of HLO text."""

    name: str
    op: str
    shapes: tuple[Shape, ...]  # of the result; several where it is a tuple
    operands: tuple[str, ...]
    called: tuple[str, ...]  # the computations it runs: loop body, branches, the inside of a fusion
    limit: int | None  # of a while that counts up to a constant: that constant
    is_root: bool
    text: str

    @property
    def cycles(self) -> int:
        """The compiler's own estimate, 0 where it makes none: of collectives and asynchronous copies, say."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def kernel_bytes(self) -> int:
        """The bytes that a Pallas kernel declares to move; 0 for other instructions and for kernels without them."""
        found = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def scope(self) -> str:
        """Where in the traced function it comes from: names of transformations and of `jax.named_scope`."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Bytes of the largest array of the result."""
        return max((shape.bytes for shape in self.shapes), default=0)


class Step(NamedTuple):
    """An instruction where it runs."""

    instruction: Instruction
    computation: dict[str, Instruction]
    loops: tuple[str, ...]  # from the outside in: "while[8]", or "while[?]" where the trip count is unknown


class Timed(NamedTuple):
    """A step and how often it runs."""

    step: Step
    times: int

    @property
    def cycles(self) -> int:
        """Cycles of all its runs together."""
        return self.times * self.step.instruction.cycles


class Program(NamedTuple):
    """A module: its computations, each by instruction name, in the order of the schedule."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def walk(self) -> Iterator[Step]:
        """Every operation reached from ENTRY, those of loops and branches where they are called."""
        yield from self._walk(self.entry, ())

    def _walk(self, name: str, loops: tuple[str, ...]) -> Iterator[Step]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Step(instruction, computation, loops)
            if instruction.op not in _ENTERED:
                continue
            inside = loops
            if instruction.op == "while":
                inside = (*loops, _loop_name(instruction))
            for called in instruction.called:
                yield from self._walk(called, inside)

    def timed(self, name: str, *, halvings: int = 0, times: int = 1, loops: tuple[str, ...] = ()) -> list[Timed]:
        """The steps of one run of a computation, with the trip counts of its loops (unknown ones count once).

        Of two branches the more expensive one counts. More than two branches are attention over longer and longer
        prefixes of the cache: the last one counts, or the one `halvings` before it.
        """
        computation = self.computations[name]
        found = []
        for instruction in computation.values():
            found.append(Timed(Step(instruction, computation, loops), times))
            if instruction.op not in _ENTERED:
                continue
            inside, runs = loops, times
            if instruction.op == "while":
                inside = (*loops, _loop_name(instruction))
                runs *= 1 if instruction.limit is None else instruction.limit
            ways = [self.timed(way, halvings=halvings, times=runs, loops=inside) for way in instruction.called]
            if instruction.op == "conditional" and len(ways) > 2:
                ways = [ways[max(len(ways) - 1 - halvings, 0)]]
            elif instruction.op == "conditional":
                ways = [max(ways, key=lambda way: sum(item.cycles for item in way))]
            found += [item for way in ways for item in way]
        return found

    def loop_body(self) -> str:
        """The body of the first loop of unknown trip count: one round, of a program that is a loop of rounds."""
        for step in self.walk():
            if step.instruction.op == "while" and step.instruction.limit is None:
                return step.instruction.called[0]
        raise ValueError("this program has no loop of unknown trip count.")

    def roots(self, step: Step) -> list[Step]:
        """The instructions that make the result: the instruction itself or, of a fusion, the roots inside it."""
        item = step.instruction
        if item.op == "fusion":
            inside = self.computations[item.called[0]]
            ends = [end for end in inside.values() if end.is_root]
        elif item.op in ("tuple", "bitcast"):
            inside, ends = step.computation, [step.computation[name] for name in item.operands]
        else:
            return [step]
        return [root for end in ends for root in self.roots(Step(end, inside, step.loops))]


def _loop_name(loop: Instruction) -> str:
    return f"while[{'?' if loop.limit is None else loop.limit}]"


def unknown_loops(program: Program) -> list[tuple[str, ...]]:
    """Where the loops of unknown trip count stand."""
    whiles = (step for step in program.walk() if step.instruction.op == "while")
    return [step.loops for step in whiles if step.instruction.limit is None]


def host_ops(program: Program) -> list[str]:
    """The instructions that communicate with the host."""
    return [step.instruction.text for step in program.walk() if step.instruction.op in _HOST_OPS]


def host_calls(stablehlo: str) -> list[str]:
    """The same in lowered text, callbacks included."""
    return _HOST_TEXT.findall(stablehlo)


def collectives(program: Program) -> list[Step]:
    """The instructions by which chips communicate."""
    return [step for step in program.walk() if collective_kind(step.instruction)]


def collective_kind(item: Instruction) -> str | None:
    """ "all-reduce", for example; None if the instruction is no collective."""
    found = _COLLECTIVE.fullmatch(item.op)
    return found[1] if found else None


def collective_bytes(item: Instruction) -> int:
    """Bytes of its result. The start of an asynchronous one also lists its operands, none larger than the result."""
    return item.bytes if item.op.endswith("-start") else sum(shape.bytes for shape in item.shapes)


def large_results(program: Program, limit: int) -> list[tuple[str, ...]]:
    """Instructions that write an array of `limit` bytes or more, except updates in place and fetches on chip."""
    found = []
    for step in program.walk():
        item = step.instruction
        if item.op in _FREE or item.op.endswith("-start") or item.bytes < limit:
            continue
        if item.op in ("copy-done", "slice-done") and _direction(step) != "within memory":
            continue
        if "ConcatBitcast" in item.text:  # joins slices fetched side by side
            continue
        if item.op == "custom-call" and _is_in_place(item, limit):
            continue
        if not all(_writes_little(root, limit) for root in program.roots(step)):
            found.append((*step.loops, item.op, item.text[:100]))
    return found


def spilled_bytes(program: Program, limit: int) -> int:
    """Bytes that loops copy out of on-chip memory, in pieces of `limit` bytes or more; each copy counts once."""
    done = (step for step in program.walk() if step.loops and step.instruction.op in ("copy-done", "slice-done"))
    sizes = [step.instruction.bytes for step in done if _direction(step) == "off chip"]
    return sum(size for size in sizes if size >= limit)


def _writes_little(root: Step, limit: int) -> bool:
    """A dynamic-update-slice of an argument writes its update only; XLA copied the argument before, if it had to."""
    item = root.instruction
    if item.op != "dynamic-update-slice":
        return item.bytes < limit
    return root.computation[item.operands[1]].bytes < limit


def _is_in_place(item: Instruction, limit: int) -> bool:
    """Whether a kernel's large results are operands of its own; XLA copied them before, if it had to."""
    aliased = {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(\d+", item.text)}
    return all(index in aliased or shape.bytes < limit for index, shape in enumerate(item.shapes))


def is_kernel(item: Instruction) -> bool:
    """Whether it is a Pallas kernel, for which the compiler makes no estimate."""
    return item.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in item.text


def _direction(step: Step) -> str:
    """Where an asynchronous copy goes: its start names both ends."""
    ends = step.computation[step.instruction.operands[0]].shapes
    if step.instruction.shapes[0].on_chip:
        return "on chip"
    return "off chip" if any(end.on_chip for end in ends) else "within memory"


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` gives."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif (match := _INSTRUCTION.match(line)) and (instruction := _instruction(match, line)):
            current[instruction.name] = instruction
    computations = {name: _with_limits(inside, computations) for name, inside in computations.items()}
    return Program(computations, entry)


def _instruction(match: re.Match[str], line: str) -> Instruction | None:
    rest = match[3]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    call = re.match(r" ?([\w\-]+)\(([^)]*)\)", rest[end:])
    if call is None:
        return None
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size), "S(" in layout)
        for dtype, dims, layout in _SHAPE.findall(rest[:end])
    )
    called = _CALLED.findall(rest[end:])
    if branches := _BRANCHES.search(rest[end:]):
        called += re.findall(r"[\w.\-]+", branches[1])
    operands = tuple(re.findall(r"%([\w.\-]+)", call[2]))
    return Instruction(match[2], call[1], shapes, operands, tuple(called), None, bool(match[1]), line.strip())


def _closing(text: str) -> int:
    """The end of the parenthesis that the text begins with."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _with_limits(inside: dict[str, Instruction], computations: dict[str, dict[str, Instruction]]):
    """The same computation with the limits of its loops, which TPU programs state in the condition only."""
    return {
        name: item._replace(limit=_limit(item.text, computations)) if item.op == "while" else item
        for name, item in inside.items()
    }


def _limit(text: str, computations: dict[str, dict[str, Instruction]]) -> int | None:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", text)
    items = list(computations[condition[1]].values()) if condition else []
    root = next((item for item in items if item.is_root), None)
    if root is None or root.op != "compare" or "direction=LT" not in root.text:
        return None
    limits = [int(found[1]) for item in items if (found := re.search(r" constant\((\d+)\)", item.text))]
    return limits[0] if len(limits) == 1 else None
