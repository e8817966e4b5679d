"""`specjax.aot`: what verification costs, what 70B needs, what does not fit, what cannot be asked, what exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from tpu import BATCH, DRAFT_LEN, activations, workload

import specjax
from specjax import models
from specjax.aot import costs, hlo, placement, planning, programs, shapes
from specjax.aot.placement import bytes_per_chip
from specjax.aot.shapes import shaped
from specjax.aot.topology import GIB, bytes_per_cycle, default_axes, hbm_bytes, num_chips
from specjax.cli import plan_display
from specjax.profiling import roofline

pytestmark = pytest.mark.tpu_aot

TOPOLOGY = "v5e:2x2"
LAYERS = 4  # of 32 or 80: a layer compiles in a second, and they are all alike


class Pass(NamedTuple):
    """Cycles of one pass of the whole 8B model."""

    estimated: int  # by the compiler, and for specjax's kernels by what they move
    least: int  # for its bytes

    @property
    def cost(self) -> int:
        """The larger of both."""
        return max(self)


@pytest.fixture(scope="module")
def passes() -> dict[tuple[int, int], Pass]:
    """By tokens a row and by how often the cache is halved to what is live."""
    work = workload(shaped("llama-8b"), shaped("llama-1b", layers=1), TOPOLOGY)
    given, rate = programs.arguments(work), bytes_per_cycle(TOPOLOGY)
    found = {}
    for tokens in (1, 5, 17):
        program = programs.compile_forward(work, given, tokens).program
        assert program is not None
        for halvings in (0, 3):
            items = program.timed(program.entry, halvings=halvings)
            cycles = sum(item.cycles + costs.kernel_cycles(item, halvings, rate) for item in items)
            live = work.capacity / 2**halvings
            count = roofline.count(given.setup.model, given.params.target, batch=work.batch, tokens=tokens, live=live)
            found[tokens, halvings] = Pass(cycles, costs.least_cycles(work, [count], rate))
    return found


@pytest.mark.parametrize(("tokens", "most"), [(5, 1.15), (17, 1.3)])
@pytest.mark.parametrize("halvings", [0, 3])
def test_verification_costs_little_more_than_a_step(passes, tokens, most, halvings):
    """Catches a pass over K+1 tokens that reads weights or cache once for each of them: 5 tokens cost what one does, 17
    cost 1.22 times that (1.26 with an eighth of the cache live)."""
    assert passes[tokens, halvings].cost < most * passes[1, halvings].cost


@pytest.mark.parametrize(("tokens", "halvings", "most"), [(5, 0, 5.7), (5, 3, 3.9), (17, 0, 11.1), (17, 3, 9.3)])
def test_estimates_of_verification_do_not_rise(passes, tokens, halvings, most):
    """Catches what the bytes of a pass would hide: padding that is multiplied (17 tokens), weights no longer fetched
    ahead, attention over all slots. Million cycles; they are 5.4, 3.6, 10.8 and 9.0. Five tokens are estimated at less
    than one; 17 at 1.7 times one (2.0), since one is estimated at less than its bytes take."""
    assert passes[tokens, halvings].estimated < most * 1e6


def test_no_pass_is_cheaper_than_its_bytes(passes):
    """Catches a limit that counts the bytes of all chips, or half of them: 7.50 billion weights of 2 bytes (all but the
    embedding), 4,096 tokens of 8 rows in 32 layers' caches of 8 heads, on four chips; what is written comes beside."""
    weights, cache = 2 * 7.504e9 / 4, 2 * 2 * 32 * 8 * 8 / 4 * 4096 * 128
    assert passes[1, 0].least == pytest.approx((weights + cache) / 546, rel=0.005)
    assert passes[1, 3].least == pytest.approx((weights + cache / 8) / 546, rel=0.005)


@pytest.fixture(scope="module")
def large() -> tuple[programs.Workload, programs.Compiled]:
    """The loop of a 70B target with a 1B draft on 16 chips, all alike but for the number of layers."""
    work = workload(shaped("llama-70b", layers=LAYERS), shaped("llama-1b", layers=2), "v5e:4x4")
    given = programs.arguments(work)
    return work, programs.compile_rounds(work, given)


def test_70b_has_two_all_reduces_per_layer(large):
    """Catches a cut over two mesh axes (8 key/value heads, 16 chips) that XLA pays for with gathers or permutes."""
    work, ready = large
    assert dict(work.layout.mesh.shape) == {"data": 1, "model": 8, "sub": 2}
    found, largest_other = activations(ready.program)
    rounds, draft_steps = ("while[?]",), ("while[?]", f"while[{DRAFT_LEN - 1}]")
    assert found == {(rounds, 8192): 2 * LAYERS + 1, (rounds, 2048): 5, (draft_steps, 2048): 5}
    assert largest_other < 4096  # logits stay where they were made


def test_70b_fits_16_chips(large):
    """Catches a buffer that is whole on every chip. Arguments are those of all 80 and 16 layers, exactly; temporaries
    are those of 4 and 2 with room to spare: the whole program has 0.13 GiB of them and peaks at 10.05 GiB."""
    _, ready = large
    whole = workload(shaped("llama-70b"), shaped("llama-1b"), "v5e:4x4")
    given = programs.arguments(whole)
    state = programs.rounds_state(whole, given)
    arguments = bytes_per_chip((given.params, state._replace(rows=state.rows._replace(keys=None))))
    assert ready.memory is not None
    assert 9.8 * GIB < arguments < 10 * GIB
    assert ready.memory.temporaries < 0.25 * GIB
    assert arguments + 0.25 * GIB < hbm_bytes("v5e:4x4")


def test_rows_over_data_stay_where_they_are():
    """Catches rows sent around by XLA, which sees their numbers only: as indices of a cache write or of a scatter, they
    become gathers and collective-permutes, dozens a layer. Data and tensor parallel at once, whole collectives only."""
    work = workload(shaped("llama-8b", layers=2), shaped("llama-1b", layers=1), "v5e:2x2", axes={"data": 2, "model": 2})
    ready = programs.compile_rounds(work, programs.arguments(work))
    found, largest_other = activations(ready.program)
    rounds, draft_steps = ("while[?]",), ("while[?]", f"while[{DRAFT_LEN - 1}]")
    assert found == {(rounds, 4096): 5, (rounds, 2048): 3, (draft_steps, 2048): 3}
    assert largest_other < 4096
    assert ready.program is not None
    kinds = {hlo.collective_kind(step.instruction) for step in hlo.collectives(ready.program) if step.loops}
    assert kinds == {"all-reduce", "all-gather"}  # the gathers are of a few numbers: each chip's best token


def test_int8_matrices_are_read_as_int8():
    """Catches XLA widening them to bfloat16 in memory, before the loop or in it: then they would save nothing."""
    work = workload(shaped("llama-8b", layers=2), shaped("llama-1b", layers=1), "v5e:2x2")
    built = models.build(work.target.config, layout=work.layout, kinds=models.INT8)
    target = work.target._replace(built=built)
    params = jax.tree.map(
        lambda leaf, place: leaf.update(dtype=leaf.dtype if leaf.dtype == jnp.int8 else jnp.bfloat16, sharding=place),
        built.abstract,
        target.places(),
    )
    work = work._replace(target=target)
    given = programs.arguments(work)
    ready = programs.compile_plain(work, given._replace(params=given.params._replace(target=params)))
    assert ready.program is not None
    assert ready.memory is not None
    half = bytes_per_chip(params)
    assert half < 0.6 * bytes_per_chip(placement.params_on(target, jnp.bfloat16))
    assert ready.memory.temporaries < half / 32
    assert hlo.large_results(ready.program, 1024 * 4096) == []  # the smallest of them, q_proj, in int8


def test_what_does_not_fit_is_a_number():
    """Catches a traceback where the compiler runs out of the chip's memory, and its message if it changes."""
    work = workload(
        shaped("llama-8b", layers=1), shaped("llama-1b", layers=1), "v5e:1x1", batch=256, capacity=32768
    )  # 34 GB of cache
    given = programs.arguments(work)
    ready = programs.compile_forward(work, given, 1)
    assert ready.memory is None
    assert ready.needed is not None
    assert 32 * GIB < ready.needed < 40 * GIB
    report = planning.report(work, given, "v5e:1x1", "bfloat16", ready, ready)
    assert not report.fits
    assert "does not fit: forward of 1 needs 3" in plan_display.headline(report)
    assert json.loads(json.dumps(plan_display.as_json(report)))["fits"] is False


TARGET = ("--model", "target", "--draft", "draft")


def _compile(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_"))}
    command = [sys.executable, "-m", "specjax.cli", "compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


def test_the_command_reports_a_plan():
    """Catches numbers that a script cannot read, and noise of libtpu beside them."""
    out = _compile(*TARGET, "--topology", "v5e:1x1", "--capacity", "256", "--no-prefill", "--json")
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    found = json.loads(out.stdout)
    assert found["fits"] is True
    assert set(found["programs"]) == {"rounds", "plain"}
    assert found["collectives_per_round"] == []
    assert found["costs"]["full"]["steps_per_round"] > 1
    assert found["costs"]["full"]["verification"] > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TARGET, "--topology", "v9:2x2"), "v5e"),
        ((*TARGET, "--topology", "v5e:2x2", "--mesh", "data=1,model=3"), "their product must be 4"),
        ((*TARGET, "--topology", "v5e:2x2", "--mesh", "data=1,heads=4"), "unknown mesh axis 'heads'"),
        ((*TARGET, "--topology", "v5e:2x2", "--mesh", "model"), "data=1,model=4"),
        ((*TARGET, "--topology", "v5e:2x2", "--mesh", "model=4"), "key/value heads do not divide"),
        (("--model", "llama-8b", "--draft", "draft", "--topology", "v5e:2x2"), "vocabularies differ"),
        (("--model", "llama-9b", "--draft", "draft", "--topology", "v5e:2x2"), "llama-8b"),
        ((*TARGET, "--topology", "v5e:1x1", "--dtype", "int8"), "cannot be int8"),
        ((*TARGET, "--topology", "v5e:1x1", "--prompt-width", "5000"), "capacity"),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments, message):
    """Catches tracebacks, and messages that do not say what would be right."""
    out = _compile(*arguments)
    assert out.returncode == 2
    assert message in out.stderr
    assert "Traceback" not in out.stderr


def test_topologies_are_read():
    """Catches chips miscounted, and heads cut over more chips than there are heads."""
    assert num_chips("v5p:2x2x2") == 8
    assert default_axes("v5e:16x16", 8, 8) == {"data": 1, "model": 8, "sub": 32}
    assert default_axes("v5e:2x2", 2, 1) == {"data": 1, "model": 1, "sub": 4}
    with pytest.raises(ValueError, match="1 to 256"):
        num_chips("v5e:32x32")


def test_known_shapes_have_the_parameters_of_their_names():
    """Catches a mistyped width."""
    billions = {name: shaped(name).parameters / 1e9 for name in shapes.CONFIGS}
    assert billions == pytest.approx(
        {"llama-100m": 0.174, "llama-1b": 1.236, "llama-3b": 3.213, "llama-8b": 8.030, "llama-70b": 70.55}, rel=0.002
    )


def test_a_generation_can_be_exported():
    """Catches what `jax.export` cannot carry: a callback, a host transfer, a dtype of keys, a custom call."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it: pip install flatbuffers")
    from jax import export

    config = models.load(models.PRETRAINED / "draft").config
    built = models.build(config)
    leaves, tree = jax.tree.flatten(built.abstract)
    drafter = specjax.drafters.draft_model(built.model)

    def run(leaves, prompts, seed):
        params = jax.tree.unflatten(tree, leaves)
        out = specjax.generate(
            built.model, params, drafter, params, prompts, key=jax.random.key(seed), max_new_tokens=16,
            sampling=specjax.Sampling(temperature=0.8, top_p=0.9),
        )  # fmt: skip
        return out.tokens, out.lengths

    shapes_of = [jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for leaf in leaves]
    prompts, seed = jax.ShapeDtypeStruct((BATCH, 8), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    exported = export.export(jax.jit(run), platforms=["tpu", "cuda"])(shapes_of, prompts, seed)
    again = export.deserialize(exported.serialize())
    assert again.platforms == ("tpu", "cuda")
    assert again.out_avals == exported.out_avals
    assert [aval.shape for aval in again.out_avals] == [(BATCH, 24), (BATCH,)]
