"""The generation loop compiled for four TPU v5e chips, with no TPU: what XLA made of it is read from its own text.

An 8B-shaped Llama target and a 1B-shaped draft in bfloat16, tensor-parallel, batch 8, capacity 4096, 4 draft tokens.
Nothing is run. test_tpu_controls.py shows that the detectors of hlo.py see what they are there for.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from tpu import BATCH, CAPACITY, DRAFT_LEN, activations, workload

from specjax.aot import costs, hlo, planning, programs
from specjax.aot.placement import bytes_per_chip
from specjax.aot.shapes import shaped
from specjax.aot.topology import bytes_per_cycle, hbm_bytes
from specjax.decode import api
from specjax.decode.state import Learnt
from specjax.kernels import attention
from specjax.profiling import roofline

pytestmark = pytest.mark.tpu_aot

TOPOLOGY = "v5e:2x2"


class Loop(NamedTuple):
    """The loop and what is known of its arguments."""

    ready: programs.Compiled
    work: programs.Workload
    given: programs.Arguments
    first_traces: int  # how often the target was traced to compile the loop
    later_traces: int  # how often to call it again
    cache_bytes: int  # of both caches, per chip
    layer_bytes: int  # of the smallest buffer among them

    @property
    def program(self) -> hlo.Program:
        """It fits, so there is one."""
        assert self.ready.program is not None
        return self.ready.program


@pytest.fixture(scope="module")
def loop() -> Loop:
    traces = []
    work = workload(shaped("llama-8b"), shaped("llama-1b"), TOPOLOGY)
    built = work.target.built
    model = built.model

    def counting(*args, **kwargs):
        traces.append(1)
        return model.apply(*args, **kwargs)

    counted = work.target._replace(built=built._replace(model=model._replace(apply=counting)))
    work = work._replace(target=counted)
    given = programs.arguments(work)
    state = programs.rounds_state(work, given)
    buffers = jax.tree.leaves([*state.target_cache[:2], *state.drafter_state.cache[:2]])
    sizes = [bytes_per_chip(leaf) for leaf in buffers]

    traces.clear()
    lowered = programs.lower_rounds(given, state)
    first = len(traces)
    programs.lower_rounds(given, state)
    later = len(traces) - first
    return Loop(programs.compiled("rounds", lowered), work, given, first, later, sum(sizes), min(sizes))


def test_one_program(loop):
    """Catches roles that hash differently from call to call, a second loop that the host would have to end, and an
    inner loop whose trip count became data."""
    assert loop.first_traces > 0
    assert loop.later_traces == 0
    assert hlo.unknown_loops(loop.program) == [()]


def test_no_host_transfer(loop):
    """Catches a debug print, a callback or a transfer left in the loop: each would stall every round."""
    assert hlo.host_calls(loop.ready.lowered) == []
    assert hlo.host_ops(loop.program) == []


def test_generate_calls_no_host(loop):
    """Catches the same in what surrounds the loop in `generate`: opening the rows, prefill, the first token."""
    given, pad_token = loop.given, jax.ShapeDtypeStruct((), jnp.int32)
    lowered = api._generate.lower(given.setup, 1, given.params, given.request, Learnt(), pad_token)
    assert hlo.host_calls(lowered.as_text()) == []


def test_donated_caches_are_aliased_and_all_fits(loop):
    """Catches a cache that leaves the loop as another buffer than it came in, and one more copy of it in between."""
    memory = loop.ready.memory
    assert memory.aliased >= loop.cache_bytes
    assert memory.temporaries < loop.cache_bytes / 8
    assert memory.peak < 6 * 2**30 < hbm_bytes(TOPOLOGY)  # 5.70 GiB: 4.30 of weights, 1.29 of caches


def test_no_result_as_large_as_a_layers_cache(loop):
    """Catches a copy, a relayout, a scatter, a gather or a rewrite of the cache, in the loop or around it."""
    found = hlo.large_results(loop.program, loop.layer_bytes)
    assert found == []


def test_few_buffers_travel_on_chip_and_back(loop):
    """Catches XLA fetching the caches into on-chip memory to write the new rows there, and carrying them back."""
    assert hlo.spilled_bytes(loop.program, loop.layer_bytes) < loop.cache_bytes / 8


def test_two_all_reduces_per_layer(loop):
    """Catches a sharding that XLA could not follow: it shows as gathers and permutes, or as one more reduction."""
    found, largest_other = activations(loop.program)
    rounds, draft_steps = ("while[?]",), ("while[?]", f"while[{DRAFT_LEN - 1}]")
    # Two per layer and one for the embedding; the draft model's first forward stands before its loop.
    assert found == {(rounds, 4096): 65, (rounds, 2048): 33, (draft_steps, 2048): 33}
    # A few numbers per row each: the logits, 128256 columns wide, stay where they were made.
    assert largest_other < 4096


def test_all_rows_are_written_by_few_kernels(loop):
    """Catches a write that falls back to a loop over rows, or to one call for each buffer: 64 of the target's, 128
    wide, and 32 of the draft's, whose heads of 64 lie the other way on TPU."""
    kernels = []
    for step in loop.program.walk():
        if programs.WRITE in step.instruction.scope:
            assert step.loops in ((), ("while[?]",))
            kernels += [len(step.instruction.shapes)] if hlo.is_kernel(step.instruction) else []
    assert kernels == [32, 32, 32]


def test_the_target_attends_by_one_kernel_a_layer(loop):
    """Catches shapes that the kernel takes no longer: XLA's form would take its place without a word. The draft's heads
    of 64 are left to XLA."""
    steps = [step for step in loop.program.walk() if step.instruction.name.startswith(attention.NAME)]
    kernels = [
        (step.loops, programs.TARGET in step.instruction.scope) for step in steps if hlo.is_kernel(step.instruction)
    ]
    assert kernels == [(("while[?]",), True)] * 32


def test_weights_are_fetched_ahead_past_kernels(loop):
    """Catches products of a form with which XLA fetches next to none while a kernel attends: 0.7 GiB a round."""
    done = [step for step in loop.program.walk() if step.instruction.op in ("copy-done", "slice-done")]
    weights = [step.instruction for step in done if len(step.instruction.shapes[0].dims) == 2 and step.loops]
    assert sum(item.bytes for item in weights if item.shapes[0].on_chip) > 3 * 2**30  # of 4.3


def test_what_a_round_costs_by_part(loop):
    """Catches parts that the report no longer finds in the program, a cache write that takes over, and logits that come
    in another layout than the probabilities need: 7.7 million cycles of sampling and bookkeeping then, 6.4 without."""
    rate = bytes_per_cycle(TOPOLOGY)
    model, params = loop.given.setup.model, loop.given.params.target
    count = roofline.count(model, params, batch=BATCH, tokens=DRAFT_LEN + 1, live=CAPACITY)
    least = {"target": costs.least_cycles(loop.work, [count], rate)}
    full, eighth = (costs.turn(loop.program, halvings, rate, least) for halvings in (0, 3))
    assert 0.2 < full.by_part["target"] / full.all < 0.5
    assert 0.2 < full.by_part["draft"] / full.all < 0.5
    assert 0.003 < full.by_part["cache write"] / full.all < 0.02
    assert full.by_part[costs.REST] < 7e6
    assert planning.kernels(loop.ready) == 3 + 32
    estimated = [sum(turn.estimated.values()) + sum(turn.counted.values()) for turn in (full, eighth)]
    assert estimated[1] < 0.9 * estimated[0]  # less of the cache is live
    # The target's kernels read the whole of a full cache, once.
    assert full.counted["target"] == pytest.approx(2 * 32 * BATCH * 2 * 4224 * 128 * 2 / 546, rel=1e-3)
    assert eighth.counted["target"] == pytest.approx(full.counted["target"] / 8, rel=1e-3)
    assert eighth.counted["cache write"] == full.counted["cache write"]
    # What it must read takes longer than the estimate says: weights that are fetched ahead are not in it.
    assert full.by_part["target"] == least["target"] > full.estimated["target"] + full.counted["target"]


def test_what_chips_tell_each_other(loop):
    """Catches a report that counts a loop's collectives once, or the wrong model's."""
    found = {(item.part, item.kind): item for item in planning.collectives(loop.ready, loop.work)}
    assert found["target", "all-reduce"].times == 65
    assert found["draft", "all-reduce"].times == 33 * DRAFT_LEN
    assert found["target", "all-reduce"].bytes == 65 * BATCH * (DRAFT_LEN + 1) * 4096 * 2
    assert {kind for part, kind in found if part in ("target", "draft")} == {"all-reduce"}
