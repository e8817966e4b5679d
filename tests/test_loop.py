"""The speculation loop: plain steps in a loop of their own, and the same rounds however they are run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import tiny
from made_up import by_plan

import specjax
from specjax import stats, verify
from specjax.aot import hlo
from specjax.decode import api, arguments, loop
from specjax.decode import state as rounds
from specjax.types import Controller, Roles

PROMPTS = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0]])
LENGTHS = jnp.array([4, 1])
_FREE = ("parameter", "get-tuple-element", "tuple", "constant", "bitcast")


def _setting(controller: Controller, most: int):
    model, params = tiny.model("llama", 0)
    draft, draft_params = tiny.model("llama", 1, num_hidden_layers=1)
    roles = Roles(model, specjax.drafters.draft_model(draft), verify.rejection(), controller)
    request = arguments.request(
        model, PROMPTS, LENGTHS, key=jax.random.key(3), max_new_tokens=most, sampling=specjax.Sampling(0.8),
        stop_tokens=(), seeds=None, capacity=None,
    )  # fmt: skip
    return roles, request, params, draft_params


@pytest.mark.parametrize("plan", [[0, 0, 3, 0, 2, 2], [0]], ids=["mixed", "plain"])
def test_rounds_one_by_one_are_those_of_generate(plan):
    """Catches a round that is run twice, left out or counted in the wrong place where plain steps follow each other."""
    roles, request, params, draft_params = _setting(by_plan(plan), 20)
    given = (roles, request.capacity)
    whole = api._generate(*given, 1, params, draft_params, request.arrays, None, 0)
    four = api._generate(*given, 4, params, draft_params, request.arrays, None, 0)
    state = rounds.start(*given, params, draft_params, request.arrays)
    step = jax.jit(loop.speculate, static_argnums=(0, 1))
    for _ in range(19):  # the most there can be
        if (state.rows.lengths >= state.rows.limits).all():
            break
        before = state.stats.rounds.max()
        state, info = step(*given, params, draft_params, state)
        assert int(state.stats.rounds.max()) == before + 1
        assert int(info.draft_lengths.max()) <= plan[int(before) % len(plan)]
    for row, length in enumerate(whole.lengths.tolist()):
        wanted = state.rows.tokens[row, :length].tolist()
        assert whole.tokens[row, :length].tolist() == four.tokens[row, :length].tolist() == wanted
    assert stats.draft_lengths(whole.stats).tolist() == stats.draft_lengths(state.stats).tolist()
    assert jax.tree.map(lambda leaf: leaf.tolist(), four.stats) == jax.tree.map(lambda leaf: leaf.tolist(), whole.stats)


def test_plain_steps_have_nothing_of_drafts_around_them():
    """Catches work that is for drafts in the loop of plain steps: many tiny operations, 2 to 3% of a step on CPU."""
    roles, request, params, draft_params = _setting(by_plan([0]), 20)
    speculating = api._generate.lower(roles, request.capacity, 1, params, draft_params, request.arrays, None, 0)
    plainly = api._autoregressive.lower(roles.model, None, request.capacity, 1, params, request.arrays, 0)
    program, plain = (hlo.parse(lowered.compile().as_text()) for lowered in (speculating, plainly))
    outer = program.computations[program.loop_body()]
    inner = next(item for item in outer.values() if item.op == "while" and item.limit is None)
    counts = [
        sum(item.op not in _FREE for item in found.computations[body].values())
        for found, body in ((plain, plain.loop_body()), (program, inner.called[0]))
    ]
    assert counts[0] <= counts[1] <= 1.2 * counts[0]
