"""The eleven bugs that others shipped (shared/FIELD.md), put in on purpose: the kit must catch each of them.

Every test runs a check as the code is, puts the bug in, and sees the same check fail.
"""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
import toys
from mutants import DRAFTER, MODEL, TABLE, VOCAB

import specjax
from specjax import Sampling, controllers, drafters, noise, sampling, testing, verify
from specjax.decode import arguments
from specjax.noise import Role
from specjax.types import Draft, Verdict, Verifier
from specjax.verify.prefix import at_tokens

pytestmark = pytest.mark.usefixtures("fresh_programs")


def _follows_the_distribution(verifier, drafter=DRAFTER, params=-TABLE, draft_len=2):
    """20,000 sequences of 4 tokens in up to 3 rounds, against the exact distribution."""
    out = specjax.generate(
        MODEL, TABLE, drafter, params, jnp.tile(jnp.array([[1, 2]]), (20_000, 1)), key=jax.random.key(1),
        max_new_tokens=4, sampling=Sampling(1.0), verifier=verifier, controller=controllers.fixed(draft_len),
    )  # fmt: skip
    probs = testing.exact_sequence_probs(MODEL, TABLE, [1, 2], 4, sampling=Sampling(1.0))
    testing.assert_same_distribution(testing.count_sequences(out.tokens, 2, 4, VOCAB), probs)


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_bug_1_noise_that_a_later_round_sees_again(monkeypatch, rule):
    _follows_the_distribution(getattr(verify, rule)())
    derive = noise.derive

    def without_rounds(keys, role, index):
        return derive(keys, role, index if role == Role.TARGET else jnp.zeros_like(index))

    monkeypatch.setattr(noise, "derive", without_rounds)
    jax.clear_caches()
    with pytest.raises(AssertionError, match="chi-square"):
        _follows_the_distribution(getattr(verify, rule)())


def test_bug_1_one_stream_for_two_roles(monkeypatch):
    derive = noise.derive
    monkeypatch.setattr(
        noise, "derive", lambda keys, role, index: derive(keys, Role.DRAFT if role == Role.ACCEPT else role, index)
    )
    with pytest.raises(AssertionError, match="chi-square"):
        _follows_the_distribution(verify.rejection())


def test_bug_2_argmax_drafts_with_softmax_probabilities():
    def propose(params, state, context, plan):
        draft, state = DRAFTER.propose(params, state, context, plan)
        return Draft(jnp.argmax(draft.probs, -1).astype(jnp.int32), draft.lengths, draft.probs), state

    wrong = DRAFTER._replace(propose=propose)
    for samples in (256, 2000):
        with pytest.raises(AssertionError, match="do not follow the distribution that the drafter states"):
            testing.check_drafter(wrong, -TABLE, target=MODEL, target_params=TABLE, samples=samples)
    with pytest.raises(AssertionError, match="chi-square"):
        _follows_the_distribution(verify.rejection(), wrong, draft_len=1)


def test_bug_3_the_minimum_over_the_batch():
    right = verify.rejection()

    def overwriting(context, draft, target):
        verdict = right.verify(context, draft, target)
        return verdict._replace(num_accepted=jnp.broadcast_to(jnp.min(verdict.num_accepted), verdict.next_token.shape))

    with pytest.raises(AssertionError, match=r"depend on its neighbours|greedy decoding gives"):
        testing.check_verifier(Verifier(overwriting))

    def wasting(context, draft, target):
        verdict = right.verify(context, draft, target)
        fewest = jnp.broadcast_to(jnp.min(verdict.num_accepted), verdict.next_token.shape)
        kept = jnp.take_along_axis(jnp.pad(draft.tokens, ((0, 0), (0, 1))), fewest[:, None], 1)[:, 0]
        return Verdict(fewest, jnp.where(fewest < verdict.num_accepted, kept, verdict.next_token))

    with pytest.raises(AssertionError, match="depend on its neighbours"):
        testing.check_verifier(Verifier(wasting))


@pytest.mark.parametrize("formula", ["each ratio alone", "no cap"])
def test_bug_4_block_verification_with_a_wrong_joint_ratio(monkeypatch, formula):
    def wrong(draft_prob, target_prob):
        ratio = target_prob / jnp.maximum(draft_prob, 1e-30)
        joint = jnp.minimum(ratio, 1.0) if formula == "each ratio alone" else jnp.cumprod(ratio, -1)
        return jnp.pad(joint, ((0, 0), (1, 0)), constant_values=1.0)

    monkeypatch.setattr(importlib.import_module("specjax.verify.block"), "_joint", wrong)
    with pytest.raises(AssertionError, match="chi-square"):
        _follows_the_distribution(verify.block(), params=0.3 * TABLE, draft_len=3)


def test_bug_5_lengths_that_count_unverified_tokens():
    # Three tokens of memory: the drafter feeds the last two itself, and only the third is in its cache.
    model = testing.table_model(3, VOCAB)
    drafter = drafters.draft_model(model)
    table = testing.random_table(jax.random.key(5), order=3, vocab_size=VOCAB)
    close = jnp.where(jax.random.uniform(jax.random.key(2), table.shape) < 0.8, table, -table)
    wanted = reference.greedy_rounds(np.asarray(table), np.asarray(close), [1, 2, 0], 40, 3)

    def takes_as_many_rounds_as_it_should(drafter):
        prompts = jnp.array([[1, 2, 0]])
        out = specjax.generate(
            model, table, drafter, close, prompts, max_new_tokens=40, controller=controllers.fixed(3)
        )
        assert out.new_tokens() == specjax.autoregressive(model, table, prompts, max_new_tokens=40).new_tokens()
        assert int(out.stats.rounds[0]) == wanted, "rounds"

    takes_as_many_rounds_as_it_should(drafter)

    def keep_all(params, state, context, tokens, hidden, keep):
        if state.block is None:
            return drafter.read(params, state, context, tokens, hidden, keep)
        cache = model.commit(state.cache, state.block, jnp.full_like(keep, tokens.shape[1]))
        return state._replace(cache=cache, read=state.read + keep, cached=state.cached + keep, block=None)

    def behind(params, state, context, tokens, hidden, keep):
        if state.block is None:
            return drafter.read(params, state, context, tokens, hidden, keep)
        return state._replace(read=state.read + keep, cached=state.cached + keep, block=None)

    for wrong in (drafter._replace(read=keep_all), drafter._replace(read=behind)):
        with pytest.raises(AssertionError, match="rounds"):
            takes_as_many_rounds_as_it_should(wrong)
    counting = MODEL._replace(commit=lambda cache, block, keep, path=None: MODEL.commit(
        cache, block, jnp.full_like(keep, block.tokens.shape[1]), path
    ))  # fmt: skip
    with pytest.raises(AssertionError, match="still knows of the others"):
        testing.check_model(counting, TABLE)


def _negative_temperature_is_greedy():
    """Padding rows come with whatever temperature; traced, no validation sees them."""
    prompts = jnp.array([[1, 2], [1, 2]])

    @jax.jit
    def run(temperature):
        return specjax.generate(
            MODEL, TABLE, DRAFTER, -TABLE, prompts, max_new_tokens=6, sampling=Sampling(temperature)
        ).tokens

    tokens = run(jnp.array([-1.0, 0.0]))
    assert (tokens[0] == tokens[1]).all()


def test_bug_6_a_temperature_that_inverts_logits(monkeypatch):
    _negative_temperature_is_greedy()
    process = sampling.process

    def dividing(logits, settings, vocab_size):
        temperature = settings.temperature[:, None, None]
        divided = logits / jnp.where(temperature == 0, 1.0, temperature)
        positive = settings._replace(temperature=jnp.where(settings.temperature < 0, 1.0, settings.temperature))
        return jnp.where(temperature < 0, divided, process(logits, positive, vocab_size))

    monkeypatch.setattr(sampling, "process", dividing)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        _negative_temperature_is_greedy()


def _no_padding_ids():
    padded = jnp.concatenate([TABLE, jnp.full((*TABLE.shape[:-1], 2), 9.0)], -1)
    model = testing.table_model(2, VOCAB, VOCAB + 2)
    for temperature in (0.0, 1.0):
        out = specjax.generate(
            model, padded, drafters.draft_model(model), padded, jnp.array([[1, 2]]), max_new_tokens=12,
            sampling=Sampling(temperature),
        )  # fmt: skip
        assert int(out.tokens.max()) < VOCAB


def test_bug_7_ids_from_padded_columns(monkeypatch):
    _no_padding_ids()
    process = sampling.process
    monkeypatch.setattr(sampling, "process", lambda logits, rows, vocab_size: process(logits, rows, logits.shape[-1]))
    jax.clear_caches()
    with pytest.raises(AssertionError):
        _no_padding_ids()


def test_bug_8_recurrent_state_that_kept_rejected_tokens():
    assert len(testing.check_model(toys.recurrent(), toys.recurrent_params())) == 6
    with pytest.raises(AssertionError, match="still knows of the others"):
        testing.check_model(toys.recurrent(keeps_rejected=True), toys.recurrent_params())


def test_bug_9_a_ring_without_room_for_the_draft():
    assert len(testing.check_model(toys.ring(), toys.ring_params())) == 6
    with pytest.raises(AssertionError, match="still knows of the others"):
        testing.check_model(toys.ring(spare=0), toys.ring_params())


def test_models_with_other_states_speculate_exactly():
    """Bugs 8 and 9, end to end: a recurrent target and one with a ring, drafted for by each other."""
    recurrent, ring = (toys.recurrent(), toys.recurrent_params()), (toys.ring(), toys.ring_params())
    prompts, lengths = jnp.array([[1, 2, 3, 4], [2, 0, 0, 0]]), jnp.array([4, 1])
    for (target, params), (draft, draft_params) in ((recurrent, ring), (ring, recurrent), (ring, ring)):
        plain = specjax.autoregressive(target, params, prompts, lengths, max_new_tokens=20)
        out = specjax.generate(
            target, params, drafters.draft_model(draft), draft_params, prompts, lengths, max_new_tokens=20,
            controller=controllers.fixed(3),
        )  # fmt: skip
        assert out.new_tokens() == plain.new_tokens()


def _stop_tokens_are_those_of_the_call():
    plain = specjax.autoregressive(MODEL, TABLE, jnp.array([[1, 2]]), max_new_tokens=12).new_tokens()[0]
    for stop in sorted(set(plain)):
        out = specjax.generate(
            MODEL, TABLE, DRAFTER, TABLE, jnp.array([[1, 2]]), max_new_tokens=12, stop_tokens=[stop]
        ).new_tokens()[0]
        assert out == plain[: plain.index(stop) + 1]


def test_bug_10_stop_tokens_of_the_first_call_for_ever(monkeypatch):
    _stop_tokens_are_those_of_the_call()
    first, request = [], arguments.request

    def remembering(*args, stop_tokens, **options):
        first.append(stop_tokens)
        return request(*args, stop_tokens=first[min(1, len(first) - 1)], **options)  # the first was for plain decoding

    monkeypatch.setattr(arguments, "request", remembering)
    with pytest.raises(AssertionError):
        _stop_tokens_are_those_of_the_call()


def test_bug_11_products_that_round_differently_by_their_rows():
    """Float32 must not do it; where bfloat16 does, `specjax bench --verify exactness` counts (test_bench.py)."""
    model, params = tiny.model("llama")

    def rounding(params, tokens, *args, **options):
        out = model.apply(params, tokens, *args, **options)
        rounded = out.logits.astype(jnp.bfloat16).astype(jnp.float32)
        return out._replace(logits=rounded if tokens.shape[1] > 1 else out.logits)

    testing.check_model(model, params, tolerance=1e-4)
    with pytest.raises(AssertionError, match="verifying several tokens is not decoding them one by one"):
        testing.check_model(model._replace(apply=rounding), params, tolerance=1e-4)


def test_taking_the_wrong_probability_is_caught():
    """One more, for the kit itself: acceptance by the target's probability alone."""

    def wrong(context, draft, target):
        verdict = verify.rejection().verify(context, draft, target)
        own = at_tokens(target.probs[:, : draft.tokens.shape[1]], draft.tokens)
        return verdict._replace(num_accepted=jnp.minimum(verdict.num_accepted, jnp.sum(own > 0.3, -1)))

    with pytest.raises(AssertionError):
        _follows_the_distribution(Verifier(wrong))
