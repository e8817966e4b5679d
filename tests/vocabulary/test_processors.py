"""Processors are exact at every drafted place: each distribution sees the draft tokens before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import Sampling, testing, tree, verify
from specjax.decode.context import make_context
from specjax.rows import open_rows

VOCAB, ORDER, LENGTH, SAMPLES, STOP = 4, 2, 4, 10_000, 3
PROMPT = [1, 2]
TABLE = testing.random_table(jax.random.key(3), order=ORDER, vocab_size=VOCAB, sharpness=1.2)
MODEL = testing.table_model(ORDER, VOCAB)
DRAFT = specjax.drafters.draft_model(MODEL)
NEUTRAL = Sampling(
    1.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=jnp.zeros(VOCAB),
    bad_words=[-1], min_new_tokens=0,
)  # fmt: skip
SETTINGS = {
    "repetition": NEUTRAL._replace(repetition_penalty=1.7),
    "presence": NEUTRAL._replace(presence_penalty=0.9),
    "frequency": NEUTRAL._replace(frequency_penalty=-0.6),
    "bias": NEUTRAL._replace(logit_bias=jnp.array([0.5, -jnp.inf, 0.0, -1.0])),
    "bad words": NEUTRAL._replace(bad_words=[2]),
    "minimum length": NEUTRAL._replace(min_new_tokens=3),
    "all": Sampling(
        0.8, 3, 0.95, 0.05, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias=jnp.array([0.0, 0.4, 0.0, -0.3]), bad_words=[0], min_new_tokens=2,
    ),
}  # fmt: skip


def _alternate(logits, tokens, length):
    """A grammar with memory: no token twice in a row, and the sum of all ids so far decides whether 0 is allowed."""
    ids = jnp.arange(logits.shape[0])
    total = jnp.sum(jnp.maximum(tokens, 0))
    is_forbidden = (ids == tokens[length - 1]) | ((ids == 0) & (total % 2 == 0))
    return jnp.where(is_forbidden, -jnp.inf, logits)


def _as_rows(settings, each):
    fields = zip(*settings, strict=True)
    return Sampling(*(jnp.repeat(jnp.stack([jnp.asarray(x) for x in field]), each, 0) for field in fields))


@pytest.mark.parametrize("processor", [None, _alternate])
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_sequences_follow_the_processed_distribution(rule, processor):
    """Catches a penalty, a mask or a grammar that does not see the draft tokens before a place, or sees others; a
    draft whose distribution is not the one it was drawn from. 4 tokens, K = 2, so 3 rounds where drafts fail; the draft
    is the reversed target. 10,000 sequences a setting, all settings in one batch, false alarms 1e-6 each."""
    sampling = _as_rows(SETTINGS.values(), SAMPLES)
    out = specjax.generate(
        MODEL, TABLE, DRAFT, -TABLE, jnp.tile(jnp.array([PROMPT]), (SAMPLES * len(SETTINGS), 1)),
        key=jax.random.key(5), max_new_tokens=LENGTH, sampling=sampling, processor=processor, stop_tokens=[STOP],
        verifier=getattr(verify, rule)(), controller=specjax.controllers.fixed(2),
    )  # fmt: skip
    for (name, setting), tokens in zip(SETTINGS.items(), np.split(np.asarray(out.tokens), len(SETTINGS)), strict=True):
        probs = testing.exact_sequence_probs(
            MODEL, TABLE, PROMPT, LENGTH, sampling=setting, stop_tokens=[STOP], processor=processor
        )
        assert probs.sum() == pytest.approx(1), name
        testing.assert_same_distribution(testing.count_sequences(tokens, len(PROMPT), LENGTH, VOCAB), probs)
    assert int(out.stats.rounds.max()) == LENGTH - 1


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_a_draft_is_processed_as_the_target_is(rule):
    """Catches a drafter whose penalties, minimum length or grammar do not see its own draft tokens: the text keeps its
    distribution, but fewer tokens stay. A model that drafts for itself must keep every token in every row; a grammar
    binds half of the rows."""

    def grammar(logits, tokens, length):
        return jnp.where(tokens[0] == 1, _alternate(logits, tokens, length), logits)

    sampling = _as_rows([NEUTRAL, *SETTINGS.values()], 8)
    sampling = jax.tree.map(lambda field: jnp.concatenate([field, field]), sampling)
    half = (len(SETTINGS) + 1) * 8
    prompts = jnp.repeat(jnp.array([[1, 2], [2, 1]]), half, 0)
    out = specjax.generate(
        MODEL, TABLE, DRAFT, TABLE, prompts, max_new_tokens=17, sampling=sampling, processor=grammar,
        controller=specjax.controllers.fixed(3), verifier=getattr(verify, rule)(), key=jax.random.key(4),
    )  # fmt: skip
    names = [f"{name}, {rest}" for rest in ("grammar", "none") for name in ["nothing", *SETTINGS] for _ in range(8)]
    fewer = np.asarray(out.stats.accepted).sum(1) < np.asarray(out.stats.drafted).sum(1)
    assert sorted({name for name, less in zip(names, fewer, strict=True) if less}) == []
    assert (out.stats.rounds == 4).all()


def test_plain_decoding_follows_the_processed_distribution():
    """Catches a processor that works in verification only."""
    setting = SETTINGS["all"]
    prompts = jnp.tile(jnp.array([PROMPT]), (SAMPLES, 1))
    out = specjax.autoregressive(
        MODEL, TABLE, prompts, max_new_tokens=LENGTH, sampling=setting, processor=_alternate, stop_tokens=[STOP]
    )
    probs = testing.exact_sequence_probs(
        MODEL, TABLE, PROMPT, LENGTH, sampling=setting, stop_tokens=[STOP], processor=_alternate
    )
    testing.assert_same_distribution(testing.count_sequences(out.tokens, len(PROMPT), LENGTH, VOCAB), probs)


def test_nothing_asked_for_is_nothing_done():
    """Catches a neutral setting that changes a distribution: the same tokens with every field neutral and with none."""
    prompts = jax.random.randint(jax.random.key(1), (64, 5), 0, VOCAB)
    outs = [
        specjax.generate(MODEL, TABLE, DRAFT, -TABLE, prompts, max_new_tokens=12, sampling=sampling)
        for sampling in (Sampling(1.0), NEUTRAL)
    ]
    assert outs[0].new_tokens() == outs[1].new_tokens()


def test_a_dead_end_ends_its_row_alone():
    """Catches NaN or an arbitrary token where nothing is allowed. Rows that start with 3 run into it after two more."""

    def wall(logits, tokens, length):
        return jnp.where((tokens[0] == 3) & (length >= 4), -jnp.inf, logits)

    prompts = jnp.array([[3, 1], [1, 2]])
    for temperature in (0.0, 1.0):
        outs = [
            specjax.generate(
                MODEL, TABLE, DRAFT, TABLE, prompts, max_new_tokens=6, processor=processor,
                sampling=Sampling(temperature),
            )
            for processor in (wall, None)
        ]  # fmt: skip
        stopped, free = outs
        assert specjax.Status(int(stopped.status[0])) == specjax.Status.DEAD_END
        assert "no token to choose" in specjax.Status.DEAD_END.describe()
        assert [len(row) for row in stopped.new_tokens()] == [2, 6]
        assert stopped.new_tokens()[1] == free.new_tokens()[1]
        assert stopped.new_tokens()[0] == free.new_tokens()[0][:2]


def test_infinite_or_missing_logits_end_the_row_at_any_temperature():
    """Catches +inf or NaN from a processor that is a choice at temperature 0 and none above it."""
    for bad in (jnp.inf, jnp.nan):
        for temperature in (0.0, 1.0):
            out = specjax.generate(
                MODEL, TABLE, DRAFT, TABLE, jnp.array([[1, 2]]), max_new_tokens=6, sampling=Sampling(temperature),
                processor=lambda logits, tokens, length, bad=bad: jnp.where(length >= 4, logits.at[0].set(bad), logits),
            )  # fmt: skip
            assert specjax.Status(int(out.status[0])) == specjax.Status.DEAD_END
            assert len(out.new_tokens()[0]) == 2


def test_a_minimum_length_holds_for_stop_tokens_only():
    """Catches an end that comes early, or a minimum that never lifts."""
    sampling = Sampling(1.0, min_new_tokens=jnp.array([0, 5] * 100), logit_bias=jnp.array([0.0, 0, 0, 3.0]))
    out = specjax.generate(
        MODEL, TABLE, DRAFT, TABLE, jnp.tile(jnp.array([PROMPT]), (200, 1)), max_new_tokens=12, sampling=sampling,
        stop_tokens=[STOP],
    )  # fmt: skip
    free, bound = out.new_tokens()[::2], out.new_tokens()[1::2]
    assert min(map(len, free)) < 3
    assert min(map(len, bound)) == 6  # five without a stop token, then one
    assert all(STOP not in row[:5] for row in bound)


def test_a_tree_is_processed_branch_by_branch():
    """Catches a place that sees a sibling branch: every node of a tree against the chain of its own ancestors."""
    parents = jnp.array([-1, -1, 0, 0, 1, 3])
    drafted = jnp.array([[1, 2, 2, 0, 1, 1], [3, 3, 1, 1, 0, 2]], jnp.int32)
    rows = open_rows(
        jnp.array([[1, 2, 1], [0, 0, 3]]), jnp.array([3, 2]), key=jax.random.key(0), seeds=jnp.arange(2),
        limits=jnp.array([20, 20]), draft_limits=jnp.array([9, 9]), sampling=SETTINGS["all"],
        stop_tokens=jnp.array([[STOP], [STOP]]), slots=24, vocab_size=VOCAB,
    )  # fmt: skip
    context = make_context(rows, None, vocab_size=VOCAB, processor=_alternate)
    shape = tree.layout(parents)
    logits = jax.random.normal(jax.random.key(2), (2, 7, VOCAB))
    whole = context.process(logits, drafted, shape.visible[..., 1:], shape.depths[:, 1:] - 1)
    for node in range(7):
        ancestors = [int(index) for index in np.flatnonzero(np.asarray(shape.visible)[0, node, 1:])]
        chain = drafted[:, jnp.array(ancestors, jnp.int32)]
        seen = jnp.ones((1, 1, len(ancestors)), bool)
        alone = context.process(logits[:, node : node + 1], chain, seen)
        np.testing.assert_array_equal(whole[:, node], alone[:, 0])


def test_bad_settings_are_refused():
    """Catches a wrong shape or value that would broadcast into a wrong distribution."""

    def run(processor=None, **fields):
        return specjax.generate(
            MODEL, TABLE, DRAFT, TABLE, jnp.array([[1]]), max_new_tokens=2, sampling=Sampling(**fields),
            processor=processor,
        )  # fmt: skip

    for fields, message in (
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0"),
        ({"presence_penalty": jnp.nan}, "presence_penalty must be finite"),
        ({"logit_bias": jnp.zeros(3)}, r"logit_bias must have shape \[V\] = \[4\]"),
        ({"logit_bias": jnp.array([0, 0, 0, jnp.inf])}, r"NaN, \+inf or a number that float32"),
        ({"bad_words": [7]}, "bad_words holds 7"),
        ({"bad_words": [-2]}, "bad_words holds -2"),
        ({"bad_words": [[1], [2, 3]]}, "rows of different lengths"),
        ({"logit_bias": {1: 2.0}}, "From ids to numbers"),
        ({"top_k": 2.5}, "must hold integers"),
        ({"temperature": "hot"}, "must hold numbers"),
        ({"bad_words": [0.5]}, "bad_words must hold integers"),
        ({"min_new_tokens": -1}, "min_new_tokens must be 0 or more"),
        ({"frequency_penalty": jnp.zeros(3)}, r"must be a scalar or have shape \[B\] = \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**fields)
    for wrong in (lambda x, *_: x[:2], lambda x, *_: x > 0, lambda x, *_: None, lambda x, *_: x.astype(jnp.int32)):
        with pytest.raises(ValueError, match="must return logits of the shape"):
            run(processor=wrong)
    with pytest.raises(ValueError, match="processor must be a function"):
        run(processor="grammar")
