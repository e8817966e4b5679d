"""Small edits that leave the text as it is, or nearly, put in on purpose: they show in acceptance, counts and scores.

As in test_mutations.py every test runs a check as the code is, puts the edit in, and sees the same check fail.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import DRAFTER, MODEL, TABLE, VOCAB

import specjax
from specjax import Sampling, controllers, drafters, noise, sampling, testing, verify
from specjax.decode import advance, context, log_probs, round
from specjax.noise import Role
from specjax.types import Verifier
from specjax.verify.prefix import at_place, draft_probs

pytestmark = pytest.mark.usefixtures("fresh_programs")
Edit = tuple[Any, str, Callable, str]  # a module, a function of it, what to put in its place, what the check then says


def _all_caught(monkeypatch, check: Callable[[], None], edits: list[Edit]) -> None:
    for module, name, wrong, message in edits:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            jax.clear_caches()
            with pytest.raises(AssertionError, match=message):
                check()


def _drafting_for_itself_all_stay():
    """1 + 4 * 4 + 3 tokens at K = 3: the last draft has two. Penalties and coupled noise, so a draft must be drawn
    exactly as the target draws."""
    out = specjax.generate(
        MODEL, TABLE, DRAFTER, TABLE, jnp.tile(jnp.array([[1, 2]]), (16, 1)), max_new_tokens=20, key=jax.random.key(6),
        sampling=Sampling(1.0, frequency_penalty=0.7), verifier=verify.coupled(), controller=controllers.fixed(3),
    )  # fmt: skip
    assert out.stats.accepted.sum() == out.stats.drafted.sum(), "rejected"
    assert out.stats.drafted.sum(1).tolist() == [14] * 16, "drafted"


def test_edits_that_cost_acceptance_are_caught(monkeypatch):
    """Noise of the next position, a draft that does not see itself, and a token drafted that has no room."""
    _drafting_for_itself_all_stay()
    draft_model = importlib.import_module("specjax.drafters.draft_model")
    draw, lengths = draft_model.draw, advance.next_draft_lengths

    def blind(seen, logits, tokens, step):
        return draw(seen._replace(process=lambda x, ids, see: seen.process(x, ids, see & False)), logits, tokens, step)

    edits: list[Edit] = [
        (context, "_coupled_keys", lambda rows, at: noise.derive(rows.keys, Role.TARGET, rows.lengths + at + 1), "rej"),
        (draft_model, "draw", blind, "rejected"),
        (
            advance,
            "next_draft_lengths",
            lambda x, y, rows: lengths(x, y, rows._replace(limits=rows.limits + 1)),
            "drafted",
        ),
    ]
    _all_caught(monkeypatch, _drafting_for_itself_all_stay, edits)


def _scores_and_tokens_are_plain_ones():
    """A row that drafts nothing beside one that does: its tokens, and log-probabilities without padding columns."""
    padded = jnp.concatenate([TABLE, jnp.full((*TABLE.shape[:-1], 2), 3.0)], -1)
    model = testing.table_model(2, VOCAB, VOCAB + 2)
    prompts, options = jnp.array([[1, 2], [1, 2]]), {"max_new_tokens": 16, "sampling": Sampling(1.0)}
    plain = specjax.autoregressive(MODEL, TABLE, prompts, **options)
    out = specjax.generate(
        model, padded, drafters.draft_model(model), padded, prompts, max_draft_len=np.array([0, 3]), **options
    )
    assert out.new_tokens()[0] == plain.new_tokens()[0], "tokens"
    np.testing.assert_allclose(out.log_probs.raw[0], plain.log_probs.raw[0], atol=1e-5, err_msg="scores")


def test_edits_that_change_a_row_without_a_draft_are_caught(monkeypatch):
    """Noise of the position before, used a second time; and logits of padding columns in the raw distribution."""
    _scores_and_tokens_are_plain_ones()
    right = round._plain_token

    def one_before(rows, scores):  # in rounds with a draft only: the plain decoding that it is compared with is right
        return right(rows._replace(lengths=rows.lengths - int(scores.logits.shape[1] > 1)), scores)

    edits: list[Edit] = [
        (round, "_plain_token", one_before, "tokens"),
        (log_probs, "without_padding", lambda logits, vocab_size: logits, "scores"),
    ]
    _all_caught(monkeypatch, _scores_and_tokens_are_plain_ones, edits)


def test_chunks_that_are_read_wrong_are_caught():
    """A drafter that takes the end of an empty chunk for the row's last token, and one that forgets earlier chunks:
    neither the output nor a row beside others shows it."""

    def repeats(remember):
        def read(params, state, context, tokens, hidden, keep):
            last = jnp.take_along_axis(tokens, jnp.maximum(keep - 1, 0)[:, None], 1)[:, 0]
            return remember(state, last, keep)

        def propose(params, state, context, plan):
            tokens = jnp.repeat(state.sum(-1, keepdims=True) % VOCAB, plan.longest, 1)
            return specjax.Draft(tokens, plan.lengths, probs=None), state

        return specjax.Drafter(propose, init=lambda params, batch, **sizes: jnp.zeros((batch, 2), jnp.int32), read=read)

    def right(state, last, keep):  # the last token, and how many there are
        return jnp.stack([jnp.where(keep > 0, last, state[:, 0]), state[:, 1] + keep], 1)

    def takes_padding(state, last, keep):
        return jnp.stack([last, state[:, 1] + keep], 1)

    def forgets(state, last, keep):
        return jnp.stack([jnp.where(keep > 0, last, state[:, 0]), keep], 1)

    def check(remember):
        testing.check_drafter(repeats(remember), (), target=MODEL, target_params=TABLE, samples=100)

    check(right)
    for wrong in (takes_padding, forgets):
        with pytest.raises(AssertionError, match="chunks of 3 and 512"):
            check(wrong)


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_small_residual_that_is_left_out_is_caught(rule):
    """By a draft so close that only 4.5% of its tokens go, each for the one token that it finds too unlikely."""
    target = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.3, 0.6])), TABLE.shape)
    draft = jnp.broadcast_to(jnp.log(jnp.array([0.055, 0.345, 0.6])), TABLE.shape)
    right = getattr(verify, rule)()

    def wrong(seen, draft, target):
        verdict = right.verify(seen, draft, target)
        probs = at_place(target.probs, verdict.num_accepted)
        own = jnp.pad(draft_probs(draft, probs.shape[-1]), ((0, 0), (0, 1), (0, 0)))
        residual = jnp.maximum(probs - at_place(own, verdict.num_accepted), 0.0)
        keys = noise.derive(seen.rows.keys, Role.RESIDUAL, seen.rows.rounds)
        anew = sampling.sample(keys, jnp.log(probs), seen.rows.sampling)
        return verdict._replace(next_token=jnp.where(jnp.sum(residual, -1) < 0.05, anew, verdict.next_token))

    def follows_the_distribution(verifier):
        """20,000 sequences of 4 tokens, K = 2, false alarms 1e-6."""
        out = specjax.generate(
            MODEL, target, DRAFTER, draft, jnp.tile(jnp.array([[1, 2]]), (20_000, 1)), key=jax.random.key(1),
            max_new_tokens=4, sampling=Sampling(1.0), verifier=verifier, controller=controllers.fixed(2),
        )  # fmt: skip
        probs = testing.exact_sequence_probs(MODEL, target, [1, 2], 4, sampling=Sampling(1.0))
        testing.assert_same_distribution(testing.count_sequences(out.tokens, 2, 4, VOCAB), probs)

    follows_the_distribution(right)
    with pytest.raises(AssertionError, match="chi-square"):
        follows_the_distribution(Verifier(wrong))
