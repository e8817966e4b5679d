"""The speculation loop: plain steps in a loop of their own, and the same rounds however they are run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import lowering
import pytest
import tiny
from made_up import by_plan

import specjax
from specjax import stats
from specjax.aot import hlo
from specjax.types import Controller

PROMPTS = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0]])
LENGTHS = jnp.array([4, 1])
_FREE = ("parameter", "get-tuple-element", "tuple", "constant", "bitcast")


def _setting(controller: Controller, most: int):
    model, params = tiny.model("llama", 0)
    draft, draft_params = tiny.model("llama", 1, num_hidden_layers=1)
    given = (model, params, specjax.drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS)
    return given, {"max_new_tokens": most, "key": jax.random.key(3), "sampling": specjax.Sampling(0.8)}, controller


@pytest.mark.parametrize("plan", [[0, 0, 3, 0, 2, 2], [0]], ids=["mixed", "plain"])
def test_rounds_one_by_one_are_those_of_generate(plan):
    """Catches a round that is run twice, left out or counted in the wrong place where plain steps follow each other."""
    given, options, controller = _setting(by_plan(plan), 20)
    whole = specjax.generate(*given, **options, controller=controller)
    four = specjax.generate(*given, **options, controller=controller, rounds_per_test=4)
    state = specjax.init(*given, **options, controller=controller)
    for _ in range(19):  # the most there can be
        if state.is_done:
            break
        before = int(state.stats.rounds.max())
        state, info = specjax.step(state)
        assert int(state.stats.rounds.max()) == before + 1
        assert int(info.draft_lengths.max()) <= plan[before % len(plan)]
    for row, length in enumerate(whole.lengths.tolist()):
        wanted = state.rows.tokens[row, :length].tolist()
        assert whole.tokens[row, :length].tolist() == four.tokens[row, :length].tolist() == wanted
    assert stats.draft_lengths(whole.stats).tolist() == stats.draft_lengths(state.stats).tolist()
    assert jax.tree.map(lambda leaf: leaf.tolist(), four.stats) == jax.tree.map(lambda leaf: leaf.tolist(), whole.stats)


def test_plain_steps_have_nothing_of_drafts_around_them():
    """Catches work that is for drafts in the loop of plain steps: many tiny operations, 2 to 3% of a step on CPU."""
    given, options, controller = _setting(by_plan([0]), 20)
    model, params, *_ = given
    speculating = lowering.lowered(*given, **options, controller=controller)
    plainly = lowering.lowered_plainly(model, params, PROMPTS, LENGTHS, **options)
    program, plain = (hlo.parse(lowered.compile().as_text()) for lowered in (speculating, plainly))
    outer = program.computations[program.loop_body()]
    inner = next(item for item in outer.values() if item.op == "while" and item.limit is None)
    counts = [
        sum(item.op not in _FREE for item in found.computations[body].values())
        for found, body in ((plain, plain.loop_body()), (program, inner.called[0]))
    ]
    assert counts[0] <= counts[1] <= 1.2 * counts[0]
