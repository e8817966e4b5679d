"""Prompts in chunks: the same as whole ones, and never past the cache's end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import specjax
from specjax.decode import prefill


def test_long_prompts_are_read_in_chunks(monkeypatch):
    """Catches chunk borders: prompts that end with a chunk, one token into the next, or chunks before their
    neighbour's; uneven chunks. The first chunk here has 7 tokens, the others 8."""
    (model, params), (draft, draft_params) = tiny.model("llama"), tiny.model("llama", 1, num_hidden_layers=1)
    prompts = jax.random.randint(jax.random.key(4), (5, 23), 0, tiny.VOCAB)
    lengths = jnp.array([23, 7, 8, 9, 15])
    wanted = specjax.autoregressive(model, params, prompts, lengths, max_new_tokens=10).new_tokens()
    monkeypatch.setattr(prefill, "CHUNK", 8)
    jax.clear_caches()
    out = specjax.generate(
        model, params, specjax.drafters.draft_model(draft), draft_params, prompts, lengths, max_new_tokens=10
    )
    assert out.new_tokens() == wanted
    asked, chunks = _read(model, params, prompts, lengths)
    monkeypatch.undo()
    whole, (one,) = _read(model, params, prompts, lengths)
    assert [len(tokens[0]) for tokens, *_ in chunks] == [7, 8, 8]
    np.testing.assert_allclose(asked.logits, whole.logits, atol=1e-4)
    for row, length in enumerate(lengths.tolist()):
        assert sum(int(keep[row]) for *_, keep in chunks) == int(one[2][row]) == length
        for layer in range(2):
            told = np.concatenate([hidden[layer][row, : keep[row]] for _, hidden, keep in chunks])
            np.testing.assert_allclose(told, one[1][layer][row, :length], atol=1e-4)
    jax.clear_caches()


def _read(model, params, prompts, lengths):
    """The prompts read, and what each chunk came with: tokens, hidden states of two layers, how many count."""
    chunks: list[tuple] = []

    def read(state, tokens, hidden, keep, cache):
        jax.debug.callback(lambda *chunk: chunks.append(chunk), tokens, hidden, keep, ordered=True)
        return state

    cache = model.init_cache(params, 5, 40)
    done = prefill.prefill(model, params, prompts, lengths, cache, hidden_layers=(0, 2), read=read)
    jax.effects_barrier()
    return done, jax.tree.map(np.asarray, chunks)


@pytest.mark.parametrize("width", [600, 1024])
def test_a_chunk_never_writes_past_the_cache(width):
    """Catches a last chunk that reaches over the cache's end: its write was moved back, over the prompt's beginning."""
    model, params = tiny.model("llama")
    prompts = jax.random.randint(jax.random.key(4), (2, width), 0, tiny.VOCAB)
    lengths = jnp.array([width, 514])
    tight, roomy = (
        specjax.autoregressive(model, params, prompts, lengths, max_new_tokens=8, capacity=capacity).new_tokens()
        for capacity in (width + 8, 2048)
    )
    assert tight == roomy
