"""Streaming gives the tokens of `generate`, with their origins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import testing
from specjax.decode.stream import Origin
from specjax.types import Status

VOCAB = 9
MODEL = testing.table_model(1, VOCAB)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=VOCAB, sharpness=2.0)
DRAFT_TABLE = TABLE.at[::2].set(0.0)
PROMPTS, LENGTHS = jnp.array([[1, 2, 3], [5, 0, 0]]), jnp.array([3, 1])
DRAFTER = specjax.drafters.draft_model(MODEL)


@pytest.mark.parametrize("rounds_per_dispatch", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chunks_add_up_to_generate(rounds_per_dispatch, temperature):
    """Catches tokens lost at the border of dispatches, state read after it was donated, origins miscounted."""
    options = {
        "max_new_tokens": jnp.array([23, 9]), "sampling": specjax.Sampling(temperature), "capacity": 30,
        "controller": specjax.controllers.fixed(3),
    }  # fmt: skip
    whole = specjax.generate(MODEL, TABLE, DRAFTER, DRAFT_TABLE, PROMPTS, LENGTHS, **options)
    chunks = list(
        specjax.stream(
            MODEL, TABLE, DRAFTER, DRAFT_TABLE, PROMPTS, LENGTHS, rounds_per_dispatch=rounds_per_dispatch, **options
        )
    )
    for row in range(2):
        assert [token for chunk in chunks for token in chunk.tokens[row]] == whole.new_tokens()[row]
        origins = [origin for chunk in chunks for origin in chunk.origins[row]]
        scores = [score for chunk in chunks for score in chunk.log_probs[row]]
        new = slice(int(LENGTHS[row]), int(whole.lengths[row]))
        for streamed, wanted in zip(zip(*scores, strict=True), whole.log_probs, strict=True):
            np.testing.assert_allclose(streamed, wanted[row, new], atol=1e-5)
        assert origins[0] == Origin.PROMPT_END
        assert origins.count(Origin.PROMPT_END) == 1
        assert origins.count(Origin.ACCEPTED) == int(whole.stats.accepted[row].sum())
    assert chunks[-1].status.tolist() == [Status.LENGTH] * 2
    for streamed, counted in zip(chunks[-1].stats, whole.stats, strict=True):
        assert (streamed == counted).all()
    assert len(chunks[0].tokens[0]) == 1


def test_stopping_early_leaves_nothing_behind():
    """Catches an iterator that must be exhausted."""
    chunks = specjax.stream(MODEL, TABLE, DRAFTER, DRAFT_TABLE, PROMPTS, LENGTHS, max_new_tokens=20)
    next(chunks)
    chunks.close()
    again = specjax.stream(MODEL, TABLE, DRAFTER, DRAFT_TABLE, PROMPTS, LENGTHS, max_new_tokens=20)
    assert sum(len(chunk.tokens[0]) for chunk in again) == 20


def test_errors_come_from_the_call():
    """Catches validation put off to the first `next`, and streaming under jit."""
    with pytest.raises(ValueError, match="rounds_per_dispatch"):
        specjax.stream(MODEL, TABLE, DRAFTER, DRAFT_TABLE, PROMPTS, rounds_per_dispatch=0)
    with pytest.raises(ValueError, match="empty"):
        specjax.stream(MODEL, TABLE, DRAFTER, DRAFT_TABLE, PROMPTS, jnp.array([3, 0]))
    with pytest.raises(ValueError, match=r"specjax\.generate"):
        jax.jit(lambda p: specjax.stream(MODEL, p, DRAFTER, p, PROMPTS, LENGTHS))(TABLE)
