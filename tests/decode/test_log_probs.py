"""The log-probabilities of a generation are those of one forward pass over the finished text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import specjax
from specjax import Sampling, testing, verify

STOP = 3
SETTINGS = Sampling(
    jnp.array([0.0, 1.0, 0.7]), top_p=jnp.array([1.0, 1.0, 0.9]), repetition_penalty=1.3, frequency_penalty=0.2,
    bad_words=[5], min_new_tokens=4,
)  # fmt: skip


def _rescore(model, params, out, sampling, row):
    """Raw and processed log-probabilities of row's generated tokens: one uncached forward, then NumPy."""
    start, end = int(out.prompt_lengths[row]), int(out.lengths[row])
    text = np.asarray(out.tokens)[row, :end]
    cache, block = model.init_cache(params, 1, end + 1), model.init_block(params, 1, end)
    logits = model.apply(params, jnp.asarray(text[None]), cache, block).logits[0, :, : model.vocab_size]
    logits = np.asarray(logits, np.float64)
    raw, processed = [], []
    one = Sampling(*(None if x is None else np.asarray(x)[row] if np.ndim(x) and len(x) == 3 else x for x in sampling))
    for place in range(start, end):
        probs = testing.numpy_probs(
            logits[place - 1], one, text=text[:place].tolist(), prompt_length=start, stop_tokens=[STOP]
        )
        processed.append(np.log(probs[text[place]]))
        raw.append(np.log(testing.numpy_probs(logits[place - 1], Sampling(1.0))[text[place]]))
    return np.array(raw), np.array(processed)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled", "plain"])
def test_equal_to_rescoring_in_one_forward(family, rule):
    """Catches a token scored at the wrong place, under the draft, or without what was processed; float32, 1e-4."""
    model, params = tiny.model(family)
    draft, draft_params = tiny.model(family, seed=1)
    prompts, lengths = jnp.array([[1, 2, 7, 4], [3, 0, 0, 0], [6, 6, 0, 0]]), jnp.array([4, 1, 2])
    options = {"max_new_tokens": jnp.array([16, 20, 9]), "sampling": SETTINGS, "stop_tokens": [STOP], "capacity": 30}
    if rule == "plain":
        out = specjax.autoregressive(model, params, prompts, lengths, **options)
    else:
        drafter = specjax.drafters.draft_model(draft)
        verifier = getattr(verify, rule)()
        out = specjax.generate(model, params, drafter, draft_params, prompts, lengths, verifier=verifier, **options)
    generated = np.arange(30)[None] - np.asarray(out.prompt_lengths)[:, None]
    is_new = (generated >= 0) & (np.arange(30)[None] < np.asarray(out.lengths)[:, None])
    for row in range(3):
        raw, processed = _rescore(model, params, out, SETTINGS, row)
        np.testing.assert_allclose(np.asarray(out.log_probs.raw)[row, is_new[row]], raw, atol=1e-4)
        np.testing.assert_allclose(np.asarray(out.log_probs.processed)[row, is_new[row]], processed, atol=1e-4)
    assert not np.asarray(out.log_probs.raw)[~is_new].any()
    assert not np.asarray(out.log_probs.processed)[~is_new].any()
    assert (np.asarray(out.log_probs.processed)[0] == 0).all()  # greedy: a one-hot distribution


@pytest.mark.parametrize("is_plain", [False, True])
def test_padding_columns_have_no_share(is_plain):
    """Catches raw log-probabilities normalised over columns that are no tokens, which models pad their vocabulary with:
    they hold large logits here. A table, so the distribution of each place is a line of it. In plain decoding, in
    rounds, and of draft tokens in a stream."""
    vocab, temperature = 5, 0.7
    table = testing.random_table(jax.random.key(2), order=1, vocab_size=vocab)
    padded = jnp.concatenate([table, jnp.full((vocab + 1, 3), 4.0)], -1)
    model = testing.table_model(1, vocab, vocab + 3)
    raw = np.asarray(jax.nn.log_softmax(table, -1))
    options = {"max_new_tokens": 20, "sampling": Sampling(temperature)}
    prompts = jnp.array([[1, 2], [3, 0]])
    drafted = (model, padded, specjax.drafters.draft_model(model), -padded, prompts)
    out = (
        specjax.autoregressive(model, padded, prompts, **options) if is_plain else specjax.generate(*drafted, **options)
    )
    tokens = np.asarray(out.tokens)
    np.testing.assert_allclose(out.log_probs.raw[:, 2:], raw[tokens[:, 1:-1], tokens[:, 2:]], atol=1e-5)
    processed = np.asarray(jax.nn.log_softmax(table / temperature, -1))
    np.testing.assert_allclose(out.log_probs.processed[:, 2:], processed[tokens[:, 1:-1], tokens[:, 2:]], atol=1e-5)
    if is_plain:
        return
    last, compared = prompts[:, 1].tolist(), 0
    for chunk in specjax.stream(*drafted, **options):
        for row, new in enumerate(chunk.tokens):
            for drafted_in_round in chunk.rounds[row]:
                before = [last[row], *drafted_in_round.tokens]
                wanted = [raw[pair] for pair in zip(before, drafted_in_round.tokens, strict=False)]
                np.testing.assert_allclose([score.raw for score in drafted_in_round.target], wanted, atol=1e-5)
                compared += len(wanted)
            last[row] = new[-1] if new else last[row]
    assert compared > 20


def test_gradients_are_not_needed_and_jit_works():
    """Catches log-probabilities that exist outside a caller's jit only."""
    model, params = tiny.model("llama")
    drafter = specjax.drafters.draft_model(model)

    @jax.jit
    def reward(params, prompts):
        out = specjax.generate(model, params, drafter, params, prompts, max_new_tokens=6, sampling=Sampling(1.0))
        return jnp.sum(out.log_probs.raw, -1)

    assert (np.asarray(reward(params, jnp.array([[1, 2], [3, 4]]))) < 0).all()
