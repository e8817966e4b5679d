"""Verifiers against NumPy with the same noise, on thousands of random inputs; degenerate distributions among them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specjax import noise, verify
from specjax.decode.context import make_context
from specjax.noise import Role
from specjax.rows import open_rows
from specjax.types import Draft, Sampling, Target

ROWS, LONGEST, WIDTH = 64, 4, 7
RULES = {
    "greedy": (verify.greedy(), reference.greedy, 0.0),
    "rejection": (verify.rejection(), reference.rejection, 1.0),
    "block": (verify.block(), reference.block, 1.0),
    "coupled": (verify.coupled(), reference.coupled, 1.0),
    "typical_lossy": (verify.typical_lossy(), reference.typical_lossy, 1.0),
    "top_k_lossy": (verify.top_k_lossy(2), functools.partial(reference.top_k_lossy, k=2), 1.0),
}
KINDS = ["dense", "sharp", "sparse", "one-hot", "ties"]


def _context(temperature, seed, rows=ROWS):
    opened = open_rows(
        jnp.ones((rows, 2), jnp.int32), jnp.full((rows,), 2), key=jax.random.key(seed), seeds=jnp.arange(rows),
        limits=jnp.full((rows,), 50), draft_limits=jnp.full((rows,), 50), sampling=Sampling(temperature),
        stop_tokens=jnp.full((rows, 1), -1), slots=60, vocab_size=WIDTH,
    )  # fmt: skip
    return make_context(opened._replace(rounds=jnp.arange(rows) % 11), None, vocab_size=WIDTH)


def _logits(random, shape, kind, dtype):
    logits = random.normal(size=shape) * (8 if kind == "sharp" else 2)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "sparse":
        logits = np.where(random.random(shape) < 0.6, -np.inf, logits)
        logits[..., 0] = np.where(np.isinf(logits).all(-1), 0.0, logits[..., 0])
    if kind == "one-hot":
        logits = np.where(np.arange(WIDTH) == logits.argmax(-1)[..., None], 0.0, -np.inf)
    return jnp.asarray(logits, dtype).astype(jnp.float32)


@functools.cache
def _compiled(name):
    rule = RULES[name][0]

    @jax.jit
    def run(seed, temperature, draft, logits):
        context = _context(temperature, seed)
        rows = context.rows
        by_position = jax.vmap(lambda place: noise.derive(rows.keys, Role.TARGET, rows.lengths + place), 0, 1)
        numbers = (
            noise.uniforms(noise.derive(rows.keys, Role.ACCEPT, rows.rounds), LONGEST),
            noise.gumbels(noise.derive(rows.keys, Role.RESIDUAL, rows.rounds), WIDTH),
            jax.vmap(noise.gumbels, (1, None), 1)(by_position(jnp.arange(LONGEST + 1)), WIDTH),
        )
        probs = jax.nn.softmax(logits, -1)
        return rule.verify(context, draft, Target(logits, probs)), probs, numbers

    return run


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    target_kind=st.sampled_from(KINDS),
    draft_kind=st.sampled_from([*KINDS, "same", "close", "argmax"]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_matches_numpy(name, seed, target_kind, draft_kind, dtype):
    """Catches a wrong residual, or one left out where it is small, a wrong joint ratio or threshold, a bonus token
    misplaced, lengths ignored, an argmax draft verified with softmax probabilities (known bug 2), minimum over the
    batch (3). 40 x 64 rows a verifier."""
    _, wanted, temperature = RULES[name]
    random = np.random.default_rng(seed)
    logits = _logits(random, (ROWS, LONGEST + 1, WIDTH), target_kind, dtype)
    draft_logits = logits[:, :LONGEST]
    if draft_kind == "close":  # what is left of the target's distribution is little, and must decide all the same
        draft_logits = draft_logits + 0.05 * random.normal(size=draft_logits.shape).astype(np.float32)
    elif draft_kind != "same":
        kind = "one-hot" if draft_kind == "argmax" else draft_kind
        draft_logits = _logits(random, (ROWS, LONGEST, WIDTH), kind, dtype)
    draft_probs = jax.nn.softmax(draft_logits, -1)
    tokens = jnp.asarray(np.argmax(np.asarray(draft_logits) + random.gumbel(size=draft_logits.shape), -1), jnp.int32)
    lengths = jnp.asarray(random.integers(0, LONGEST + 1, ROWS), jnp.int32)
    draft = Draft(tokens, lengths, None if draft_kind == "argmax" else draft_probs)
    verdict, probs, numbers = _compiled(name)(seed, temperature, draft, logits)

    accepted, following, tokens, lengths, draft_probs, probs, uniforms, residual_noise, target_noise = (
        np.asarray(x) for x in (verdict.num_accepted, verdict.next_token, tokens, lengths, draft_probs, probs, *numbers)
    )
    close = 0
    for row in range(ROWS):
        case = reference.Case(
            tokens[row], int(lengths[row]), draft_probs[row].astype(np.float64), probs[row].astype(np.float64),
            uniforms[row], residual_noise[row], target_noise[row],
        )  # fmt: skip
        decision = wanted(case)
        close += decision.margin < 1e-5
        if decision.margin >= 1e-5:
            assert (accepted[row], following[row]) == decision[:2], (row, case, decision)
    assert close <= ROWS // 8


def test_all_exact_verifiers_are_greedy_at_temperature_zero():
    """Catches a rule whose limit at temperature 0 is anything but greedy verification, ties included."""
    random = np.random.default_rng(1)
    logits = _logits(random, (ROWS, LONGEST + 1, WIDTH), "ties", jnp.float32)
    best = jnp.argmax(logits, -1)
    one_hot = jnp.where(jnp.arange(WIDTH)[None, None] == best[..., None], 0.0, -jnp.inf)
    target = Target(one_hot, jax.nn.softmax(one_hot, -1))
    is_right = random.random((ROWS, LONGEST)) < 0.7
    tokens = jnp.where(is_right, best[:, :LONGEST], random.integers(0, WIDTH, (ROWS, LONGEST))).astype(jnp.int32)
    draft = Draft(tokens, jnp.full((ROWS,), LONGEST), jax.nn.one_hot(tokens, WIDTH))
    verdicts = {name: rule.verify(_context(0.0, 3), draft, target) for name, (rule, *_) in RULES.items()}
    wanted = verdicts["greedy"]
    assert 0.5 < float(wanted.num_accepted.mean()) < LONGEST
    for name, verdict in verdicts.items():
        assert (verdict.num_accepted == wanted.num_accepted).all(), name
        assert (verdict.next_token == wanted.next_token).all(), name


@pytest.mark.parametrize("name", RULES)
def test_an_accepted_token_has_target_mass(name):
    """Catches `<=` in the acceptance test: u = 0 would keep a token that the target never emits."""
    target = jnp.zeros((ROWS, LONGEST + 1, WIDTH)).at[..., 0].set(1.0)
    tokens = jnp.ones((ROWS, LONGEST), jnp.int32)
    draft = Draft(tokens, jnp.full((ROWS,), LONGEST), jnp.zeros((ROWS, LONGEST, WIDTH)))
    verdict = RULES[name][0].verify(_context(1.0, 3), draft, Target(jnp.log(target), target))
    assert int(verdict.num_accepted.max()) == 0
    assert int(verdict.next_token.max()) == 0


def test_block_keeps_at_least_as_much_as_token_level():
    """Catches a block rule that gives its gain away. Same distributions, drafts and uniforms, 40,000 rows."""
    rows = 2000
    random = np.random.default_rng(5)
    logits = _logits(random, (1, LONGEST + 1, WIDTH), "dense", jnp.float32)
    probs = jax.nn.softmax(_logits(random, (1, LONGEST, WIDTH), "dense", jnp.float32), -1)

    @jax.jit
    def accepted(seed):
        drawn = jax.random.categorical(
            jax.random.fold_in(jax.random.key(9), seed), jnp.log(probs), shape=(rows, LONGEST)
        )
        draft = Draft(drawn.astype(jnp.int32), jnp.full((rows,), LONGEST), jnp.repeat(probs, rows, 0))
        full = jnp.repeat(logits, rows, 0)
        target = Target(full, jax.nn.softmax(full, -1))
        rules = (verify.rejection(), verify.block())
        return [rule.verify(_context(1.0, seed, rows), draft, target).num_accepted.mean() for rule in rules]

    token_level, block = np.mean([accepted(seed) for seed in range(20)], 0)
    assert block > 1.02 * token_level


def test_parameters_out_of_range():
    """Catches a lossy rule that accepts nonsense."""
    with pytest.raises(ValueError, match="epsilon must be in"):
        verify.typical_lossy(epsilon=0.0)
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        verify.top_k_lossy(0)
    with pytest.raises(ValueError, match=r"k must be a whole number, 1 or more, got 2\.5"):
        verify.top_k_lossy(2.5)  # pyright: ignore[reportArgumentType]
    assert verify.top_k_lossy(np.int64(2)).verify  # pyright: ignore[reportArgumentType]
