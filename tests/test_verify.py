"""Verifiers against NumPy with the same noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import rejection as reference_rejection

from specjax import noise, verify
from specjax.noise import Role
from specjax.rows import open_rows
from specjax.types import Context, Draft, Sampling, Target

ROWS, LONGEST, WIDTH = 1000, 4, 7


def _context(temperature):
    rows = open_rows(
        jnp.ones((ROWS, 2), jnp.int32), jnp.full((ROWS,), 2), key=jax.random.key(3), seeds=jnp.arange(ROWS),
        limits=jnp.full((ROWS,), 50), sampling=Sampling(temperature), stop_tokens=jnp.full((ROWS, 1), -1),
        slots=60, vocab_size=WIDTH,
    )  # fmt: skip
    return Context(rows._replace(rounds=jnp.arange(ROWS) % 11), None)


def _laws(key, shape, kind):
    logits = 2 * jax.random.normal(key, shape)
    if kind == "sparse":
        logits = jnp.where(jax.random.uniform(jax.random.fold_in(key, 1), shape) < 0.6, -jnp.inf, logits)
        logits = logits.at[..., 0].set(jnp.where(jnp.all(logits == -jnp.inf, -1), 0.0, logits[..., 0]))
    if kind == "one-hot":
        logits = jnp.where(jnp.arange(WIDTH)[None, None] == jnp.argmax(logits, -1, keepdims=True), 0.0, -jnp.inf)
    return logits, jax.nn.softmax(logits, -1)


@pytest.mark.parametrize("target_kind", ["dense", "sparse", "one-hot"])
@pytest.mark.parametrize("draft_kind", ["dense", "sparse", "one-hot", "none", "same"])
def test_rejection_matches_numpy(target_kind, draft_kind):
    """Catches a wrong residual, a bonus token from the wrong place, lengths ignored, an argmax draft verified with
    softmax probabilities (known bug 2), minimum over the batch (known bug 3)."""
    keys = jax.random.split(jax.random.key(5), 4)
    logits, target_probs = _laws(keys[0], (ROWS, LONGEST + 1, WIDTH), target_kind)
    _, draft_probs = _laws(keys[1], (ROWS, LONGEST, WIDTH), draft_kind)
    if draft_kind == "same":
        draft_probs = target_probs[:, :LONGEST]
    tokens = jax.random.categorical(keys[2], jnp.log(draft_probs)).astype(jnp.int32)
    lengths = jax.random.randint(keys[3], (ROWS,), 0, LONGEST + 1)
    draft = Draft(tokens, lengths, None if draft_kind == "none" else draft_probs)
    context = _context(1.0)
    verdict = jax.jit(verify.rejection().verify)(context, draft, Target(logits, target_probs))

    rounds = context.rows.rounds
    uniforms = np.asarray(noise.uniforms(noise.derive(context.rows.keys, Role.ACCEPT, rounds), LONGEST))
    gumbels = np.asarray(noise.gumbels(noise.derive(context.rows.keys, Role.RESIDUAL, rounds), WIDTH))
    laws = [None] * ROWS if draft.probs is None else np.asarray(draft.probs)
    tokens, lengths, target_probs = (np.asarray(x) for x in (tokens, lengths, target_probs))
    accepted, following = np.asarray(verdict.num_accepted), np.asarray(verdict.next_token)
    for row in range(ROWS):
        wanted = reference_rejection(
            tokens[row], lengths[row], laws[row], target_probs[row], uniforms[row], gumbels[row]
        )
        assert (accepted[row], following[row]) == wanted


def test_greedy_and_rejection_agree_at_temperature_zero():
    """Catches a greedy verifier that is anything but the limit of rejection sampling."""
    logits, _ = _laws(jax.random.key(1), (ROWS, LONGEST + 1, WIDTH), "dense")
    best = jnp.argmax(logits, -1)
    one_hot = jnp.where(jnp.arange(WIDTH)[None, None] == best[..., None], 0.0, -jnp.inf)
    target = Target(one_hot, jax.nn.softmax(one_hot, -1))
    noisy = jax.random.randint(jax.random.key(2), (ROWS, LONGEST), 0, WIDTH)
    is_right = jax.random.uniform(jax.random.key(3), (ROWS, LONGEST)) < 0.7
    tokens = jnp.where(is_right, best[:, :LONGEST], noisy).astype(jnp.int32)
    draft = Draft(tokens, jnp.full((ROWS,), LONGEST), jax.nn.one_hot(tokens, WIDTH))
    ours, theirs = (rule.verify(_context(0.0), draft, target) for rule in (verify.greedy(), verify.rejection()))
    assert (ours.num_accepted == theirs.num_accepted).all()
    assert (ours.next_token == theirs.next_token).all()
    assert 0.5 < float(ours.num_accepted.mean()) < LONGEST


def test_an_accepted_token_has_target_mass():
    """Catches `<=` in the acceptance test: u = 0 would keep a token that the target never emits."""
    target = jnp.zeros((ROWS, LONGEST + 1, WIDTH)).at[..., 0].set(1.0)
    tokens = jnp.ones((ROWS, LONGEST), jnp.int32)
    draft = Draft(tokens, jnp.full((ROWS,), LONGEST), jnp.zeros((ROWS, LONGEST, WIDTH)))
    verdict = verify.rejection().verify(_context(1.0), draft, Target(jnp.log(target), target))
    assert int(verdict.num_accepted.max()) == 0
    assert int(verdict.next_token.max()) == 0
