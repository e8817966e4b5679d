"""An adaptive loop compiled for four TPU v5e chips: its branches are in place, and a narrow one does less."""

from __future__ import annotations

import math
import re

import jax
import pytest
from made_up import profile
from tpu import BATCH, CAPACITY, workload

from specjax import controllers
from specjax.aot import hlo, programs
from specjax.aot.placement import bytes_per_chip
from specjax.aot.shapes import shaped

pytestmark = pytest.mark.tpu_aot

LAYERS = 2


@pytest.fixture(scope="module")
def loop():
    """8B- and 1B-shaped models of two layers each; drafts of 0, 1 or up to 4 tokens."""
    work = workload(shaped("llama-8b", layers=LAYERS), shaped("llama-1b", layers=LAYERS), "v5e:2x2")
    given = programs.arguments(work)
    table = profile((1.0, 1.02, 1.05, 1.1, 1.2), batch=BATCH, buckets=(0, 1, 4), context=CAPACITY // 2)
    given = given._replace(setup=given.setup._replace(controller=controllers.throughput(table)))
    state = programs.rounds_state(work, given)
    sizes = [
        bytes_per_chip(leaf) for leaf in jax.tree.leaves([*state.target_cache[:2], *state.drafter_state.cache[:2]])
    ]
    return programs.compiled("rounds", programs.lower_rounds(given, state)), sizes


def test_caches_stay_where_they_are(loop):
    """Catches a choice of widths that copies the caches in and out of its branches, as conditionals do."""
    ready, sizes = loop
    assert hlo.host_calls(ready.lowered) == []
    assert hlo.host_ops(ready.program) == []
    assert ready.memory.aliased >= sum(sizes)
    # The draft model catches up by passes over 32 tokens: scores of 4 * 32 queries, which are no cache.
    is_scores = re.compile(r"f32\[\d+,\d+,128,\d+\]").search
    assert [found for found in hlo.large_results(ready.program, min(sizes)) if not is_scores(found[-1])] == []


def test_each_width_is_a_pass_of_its_own(loop):
    """Catches one pass at the full width for all: the all-reduces of activations show how many tokens each carries,
    BATCH * 1, 2 or 5, and each stands in a loop of its own: a plain step in that of rounds, the others in that of
    rounds with a draft. On a GPU the host waits for every loop, so a plain step is in no more of them."""
    ready, _ = loop
    found: dict[int, set[tuple[int, int]]] = {}
    for step in hlo.collectives(ready.program):
        for shape in step.instruction.shapes:
            if shape.dtype == "bf16" and shape.dims[-1:] == (4096,):
                count = math.prod(shape.dims[:-1])
                found.setdefault(id(step.computation), set()).add((count, len(step.loops)))
    assert sorted(map(list, found.values())) == [[(BATCH, 2)], [(2 * BATCH, 3)], [(5 * BATCH, 3)]]
