"""Rows of a `step` loop that another request takes over, slots that fill one by one, parameters that change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import specjax
from specjax import Sampling, controllers

VOCAB = tiny.VOCAB
PROMPTS = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0], [7, 8, 9, 0]])
LENGTHS = jnp.array([4, 1, 3])
GIVEN = (PROMPTS, LENGTHS)


@pytest.fixture(scope="module")
def target():
    return tiny.model("llama", 0)


def _end(state):
    while not state.is_done:
        state, _ = specjax.step(state)
    return specjax.finish(state)


@pytest.mark.parametrize("kind", ["llama", "table"])
def test_a_row_is_replaced_in_the_middle(kind):
    """Catches caches, counts, keys or penalties of the request before, a row put into the wrong axis, and neighbours
    that notice. Both the row that came and those that stayed emit what they would alone."""
    (model, params), (draft, draft_params) = tiny.model(kind, 0), tiny.model(kind, 1)
    given = (model, params, specjax.drafters.draft_model(draft), draft_params)
    sampling = Sampling(0.9, frequency_penalty=0.4)
    options = {"sampling": sampling, "capacity": 30, "key": jax.random.key(2)}
    state = specjax.init(
        *given, *GIVEN, max_new_tokens=20, **options, seeds=jnp.array([3, 4, 5]), stop_tokens=[11, -1],
        controller=controllers.fixed(3),
    )  # fmt: skip
    for _ in range(2):
        state, _ = specjax.step(state)
    late = {"max_new_tokens": 12, "stop_tokens": [6]}
    state = specjax.admit(
        state, 1, jnp.array([9, 8, 7, 6, 0]), 4, seed=77, key=jax.random.key(2), sampling=sampling, **late
    )
    out = _end(state)
    stayed = specjax.generate(
        *given, *GIVEN, max_new_tokens=20, **options, seeds=jnp.array([3, 4, 5]), stop_tokens=[11],
        controller=controllers.fixed(3),
    )  # fmt: skip
    alone = specjax.generate(
        *given, jnp.array([[9, 8, 7, 6]]), **options, seeds=jnp.array([77]), controller=controllers.fixed(3), **late
    )
    assert [out.new_tokens()[row] for row in (0, 2)] == [stayed.new_tokens()[row] for row in (0, 2)]
    assert out.new_tokens()[1] == alone.new_tokens()[0]
    assert out.stats.rounds[1] == alone.stats.rounds[0]
    np.testing.assert_allclose(out.log_probs.raw[1], alone.log_probs.raw[0], atol=1e-5)


def test_slots_fill_one_by_one_and_what_does_not_fit_is_refused(target):
    """Catches slots that need a text, and requests or states that would go wrong in silence."""
    model, params = target
    given = (model, params, specjax.drafters.draft_model(model), params)
    state = specjax.open_slots(*given, 2, capacity=20, num_stop_tokens=1)
    assert bool(state.is_done)
    state = specjax.admit(state, 1, jnp.array([3, 4]), seed=1, max_new_tokens=5)
    used = state
    state, info = specjax.step(state)
    assert info.num_emitted.tolist()[0] == 0
    state = specjax.admit(state, 0, jnp.array([5, 6]), seed=0, max_new_tokens=5)
    wanted = specjax.autoregressive(model, params, jnp.array([[5, 6], [3, 4]]), max_new_tokens=5).new_tokens()
    with pytest.raises(ValueError, match="used before"):
        specjax.step(used)
    for wrong, message in (
        ({"stop_tokens": [1, 2]}, "stop_tokens must be"),
        ({"sampling": Sampling(presence_penalty=0.5)}, "does not fit the state"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            specjax.admit(state, 0, jnp.array([5, 6]), seed=0, **{"max_new_tokens": 5, **wrong})
    for row, prompt in ((2, [1]), (0, [[1]]), (0, [VOCAB])):
        with pytest.raises(ValueError, match=r"row must be in|one request a call|outside the vocabulary"):
            specjax.admit(state, row, jnp.array(prompt), seed=0)
    with pytest.raises(ValueError, match=r"must be a specjax\.State"):
        specjax.step(info)
    assert _end(state).new_tokens() == wanted


def test_parameters_can_change_between_rounds(target):
    """Catches parameters captured by a compiled step: the state's own count."""
    model, params = target
    other = tiny.model("llama", 5)[1]
    state = specjax.init(model, params, specjax.drafters.draft_model(model), params, *GIVEN, max_new_tokens=9)
    state = dataclasses.replace(state, params=state.params._replace(target=other, drafter=other))
    end = _end(state)
    firsts = [row[0] for row in end.new_tokens()]
    plain = specjax.autoregressive(model, params, *GIVEN, max_new_tokens=1).new_tokens()
    assert firsts == [row[0] for row in plain]
    assert end.new_tokens() != specjax.autoregressive(model, params, *GIVEN, max_new_tokens=9).new_tokens()
