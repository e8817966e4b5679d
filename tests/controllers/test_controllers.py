"""Controllers: what they choose, exactness with each of them, rounds without a draft, limits of rows, memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
import tiny
from jax._src import test_util as jtu
from made_up import by_plan, profile, round_of

import specjax
from specjax import controllers, stats, testing, verify
from specjax.aot import hlo
from specjax.decode import round as rounds
from specjax.decode.context import context_of

VOCAB = 13
PROMPTS = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0]])
LENGTHS = jnp.array([4, 1, 2])


CHEAP = profile()
DEAR = profile((1.0, 2.5, 4.0, 5.5))  # not even a perfect draft pays


SOMETIMES = by_plan([0, 0, 3, 1, 0, 2, 0, 0, 0, 0, 0, 3])
SELDOM = by_plan([0] * 35 + [3] + [0] * 70 + [3])
ALL = {
    "fixed": controllers.fixed(3),
    "additive": controllers.additive(3, 1),
    "confidence": controllers.confidence(0.5, 3),
    "throughput": controllers.throughput(CHEAP),
    "sometimes": SOMETIMES,
}


def _pair(name):
    if name == "table":
        model = testing.table_model(2, VOCAB)
        table = testing.random_table(jax.random.key(0), order=2, vocab_size=VOCAB, sharpness=2.0)
        noise = testing.random_table(jax.random.key(1), order=2, vocab_size=VOCAB)
        return model, table, model, jnp.where(jax.random.uniform(jax.random.key(5), table.shape) < 0.5, table, noise)
    return *tiny.model("llama", 0), *tiny.model("llama", 1, num_hidden_layers=1)


@pytest.mark.parametrize("name", [name for name in ALL if name != "fixed"])
@pytest.mark.parametrize(
    "rule", ["rejection", "block"]
)  # with coupled() tests/testing/test_contract.py knows each token
def test_sampled_output_follows_the_distribution(rule, name):
    """Catches a draft length that leaks: from the token that ends a draft, from noise that verification will use, or in
    block verification from where the draft ends. Whole sequences over up to 4 rounds against seven adversaries;
    false alarms 1e-6 a test."""
    apart = name != "throughput"
    options = {"verifier": getattr(verify, rule)(), "rows_apart": apart, "samples": 4000}
    assert len(testing.check_controller(ALL[name], **options)) == 28 + 7 * apart


def test_leaving_the_last_token_out_is_noticed():
    """The suite can fail: a rule that drops the token it does not like biases those that stay."""
    model = testing.table_model(1, 4)
    honest = specjax.drafters.draft_model(model)

    def propose(params, state, context, plan):
        draft, state = honest.propose(params, state, context, plan)
        own = jnp.take_along_axis(draft.probs, draft.tokens[..., None], -1)[..., 0]
        return draft._replace(lengths=jnp.sum(jnp.cumprod((own >= 0.3).astype(jnp.int32), -1), -1)), state

    table = testing.random_table(jax.random.key(3), order=1, vocab_size=4)
    out = specjax.generate(
        model, table, honest._replace(propose=propose), -table, jnp.ones((20_000, 1), jnp.int32), max_new_tokens=3,
        sampling=specjax.Sampling(1.0), controller=controllers.fixed(2), capacity=8,
    )  # fmt: skip
    probs = testing.exact_sequence_probs(model, table, [1], 3, sampling=specjax.Sampling(1.0))
    with pytest.raises(AssertionError, match="chi-square"):
        testing.assert_same_distribution(testing.count_sequences(out.tokens, 1, 3, 4), probs)


@pytest.mark.parametrize(("controller", "most", "turns"), [(SOMETIMES, 40, 14), (SELDOM, 120, 107)])
def test_the_draft_model_catches_up(controller, most, turns):
    """Catches tokens that the draft model never read, after rounds without a draft: drafting for itself, every draft
    token must be accepted, and its cache hold all tokens but the last two. Few tokens are read in narrow passes, many
    in wide ones, but for those after which the cache has no room for a wide one: `SELDOM` needs 4 + 120 + 4 slots,
    all that a cache of 128 has, and a pass that went beyond them would be written over what was read before."""
    model, params = tiny.model("llama", 0)
    drafter = specjax.drafters.draft_model(model)
    state = specjax.init(model, params, drafter, params, PROMPTS, LENGTHS, max_new_tokens=most, controller=controller)
    for _ in range(turns):
        state, info = specjax.step(state)
        assert (info.num_accepted == info.draft_lengths).all()
        if info.draft_lengths.max() > 0:
            assert (state.carry.drafter_state.cache.lengths == state.rows.lengths - 2).all()
    assert int(state.stats.by_longest[0, 0]) >= turns // 2
    assert int(state.stats.by_longest[0, 3]) >= 2


def test_a_row_may_switch_speculation_off():
    """Catches limits of rows that are ignored, or that change a token; `max_draft_len` is data, not a new program."""
    model, params, draft, draft_params = _pair("table")
    drafter = specjax.drafters.draft_model(draft)
    # The row that drafts nothing ends first: else `throughput` sees no use in drafts.
    most = np.array([10, 30, 30])
    plain = specjax.autoregressive(model, params, PROMPTS, LENGTHS, max_new_tokens=most).new_tokens()
    for name in ("fixed", "throughput"):

        def run(limits, name=name):
            return specjax.generate(
                model, params, drafter, draft_params, PROMPTS, LENGTHS, max_new_tokens=most, controller=ALL[name],
                max_draft_len=np.array(limits),
            )  # fmt: skip

        out = run([0, 2, 9])
        assert out.new_tokens() == plain
        assert out.stats.drafted[0].tolist() == [0, 0, 0]
        assert out.stats.drafted[1, 2] == 0 < out.stats.drafted[1, 0]
        assert out.stats.drafted[2].sum() > 0
        with jtu.count_jit_compilation_cache_miss() as misses:
            none = run([0, 0, 0])
        assert misses() == 0
        assert none.new_tokens() == plain
        assert none.stats.drafted.sum() == 0
        assert none.stats.rounds.tolist() == [9, 29, 29]


def test_plain_rounds_are_the_plain_tokens_when_sampled():
    """Catches noise of a round without a draft that is not that of plain decoding: same seeds, same tokens, whether no
    row drafts or others do."""
    model, params, draft, draft_params = _pair("table")
    given = (model, params, specjax.drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS)
    options = {"max_new_tokens": 30, "sampling": specjax.Sampling(1.0), "key": jax.random.key(8)}
    plain = specjax.autoregressive(model, params, PROMPTS, LENGTHS, **options).new_tokens()
    alone = specjax.generate(*given, controller=ALL["throughput"], max_draft_len=0, **options)
    assert alone.new_tokens() == plain
    beside = specjax.generate(*given, controller=ALL["fixed"], max_draft_len=np.array([0, 2, 9]), **options)
    assert beside.new_tokens()[0] == plain[0]
    assert beside.stats.drafted.sum(1)[0] == 0 < beside.stats.drafted[1:].sum(1).min()
    assert beside.stats.rounds[0] == 29 > beside.stats.rounds[1:].max()


def test_a_draft_of_nothing_is_a_plain_step():
    """Catches a wide pass paid for where a drafter finds nothing, as one that copies from the text does."""
    model, params, _, _ = _pair("table")
    widths = []

    def apply(params, tokens, cache, block, **options):
        jax.debug.callback(lambda: widths.append(tokens.shape[1]))
        return model.apply(params, tokens, cache, block, **options)

    def propose(params, state, context, plan):
        batch = context.rows.lengths.shape[0]
        found = jnp.where(context.rows.lengths % 4 == 0, plan.lengths, 0)
        return specjax.Draft(jnp.zeros((batch, plan.longest), jnp.int32), found, None), state

    seldom = specjax.Drafter(propose)
    options = {"max_new_tokens": 24, "sampling": specjax.Sampling(1.0), "key": jax.random.key(3)}
    out = specjax.generate(
        model._replace(apply=apply), params, seldom, None, PROMPTS[:1], LENGTHS[:1],
        controller=controllers.throughput(CHEAP)._replace(draft_len=lambda state, rows: jnp.full((1,), 3)),
        verifier=verify.coupled(), **options,
    )  # fmt: skip
    jax.effects_barrier()
    assert out.new_tokens() == specjax.autoregressive(model, params, PROMPTS[:1], LENGTHS[:1], **options).new_tokens()
    rounds = np.asarray(out.stats.by_longest[0])
    assert rounds[0] > 5
    assert rounds[1:].sum() > 1
    assert sum(width > 1 for width in widths[1:]) == rounds[1:].sum()  # the first reads the prompt
    assert sum(width == 1 for width in widths[1:]) == rounds[0]


def test_additive_moves_by_its_steps():
    """Catches steps the wrong way round, and rounds cut short by a limit that count as failures."""
    controller = controllers.additive(8, 5)
    state = controller.init(4)
    info = round_of(draft_lengths=[5, 5, 3, 0], num_accepted=[5, 4, 3, 0], num_emitted=[6, 5, 4, 1])
    assert controller.update(state, info).tolist() == [7, 4, 5, 5]
    full = round_of(draft_lengths=[7, 1, 1, 1], num_accepted=[7, 0, 1, 0], num_emitted=[8, 1, 2, 1])
    assert controller.update(jnp.array([7, 1, 1, 2]), full).tolist() == [8, 1, 3, 2]


def test_confidence_stops_at_the_first_doubt():
    """Catches a rule that reads the one-hot distribution of temperature 0, or drops the doubtful token. Each draft's
    tokens but the last are at or above the threshold, and the last below, unless it has K."""
    model, params, draft, draft_params = _pair("table")
    seen = set()
    for temperature in (0.0, 1.0):
        chunks = specjax.stream(
            model, params, specjax.drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS, max_new_tokens=40,
            controller=controllers.confidence(0.5, 3), sampling=specjax.Sampling(temperature),
        )  # fmt: skip
        texts = [PROMPTS[row, :length].tolist() for row, length in enumerate(LENGTHS.tolist())]
        for chunk in chunks:
            for row, new in enumerate(chunk.tokens):
                for one in chunk.rounds[row]:
                    text = texts[row] + one.tokens
                    at = [
                        float(jax.nn.softmax(_logits(draft_params, text[: len(texts[row]) + place]))[token])
                        for place, token in enumerate(one.tokens)
                    ]
                    assert all(prob >= 0.5 for prob in at[:-1])
                    assert len(texts[row]) + len(one.tokens) >= 40 or len(one.tokens) == 3 or at[-1] < 0.5
                    seen.add(len(one.tokens))
                texts[row] += new
    assert seen >= {1, 2, 3}


def _logits(table, text):
    padded = [VOCAB, *text]
    return table[padded[-2], padded[-1]]


def test_what_was_learnt_is_handed_on():
    """Catches a second call that starts afresh, or takes its texts for the last ones, or a state that does not fit and
    fails deep inside."""
    model, params, draft, _ = _pair("table")
    drafter, bad = specjax.drafters.draft_model(draft), -params
    controller = controllers.throughput(profile((1.0, 1.2, 1.4, 1.6), change=0.2))
    options = {"max_new_tokens": 60, "controller": controller}
    first = specjax.generate(model, params, drafter, bad, PROMPTS, LENGTHS, **options)
    second = specjax.generate(
        model, params, drafter, bad, PROMPTS, LENGTHS, controller_state=first.controller_state, **options
    )
    assert second.stats.drafted.sum() < first.stats.drafted.sum()  # it knows that the draft is bad
    assert second.controller_state.ledger < 0 == first.controller_state.ledger
    third = specjax.generate(
        model, params, drafter, bad, PROMPTS, LENGTHS, controller_state=second.controller_state,
        **{**options, "max_new_tokens": 1},
    )  # fmt: skip
    learnt = third.controller_state
    assert learnt.pair_tested == second.controller_state.pair_tested
    assert learnt.pair_accepted < 0.5 * learnt.pair_tested  # the draft is bad, and that is what stays
    assert not jnp.any(learnt.tested)
    with pytest.raises(
        ValueError, match=r"for 1 rows this controller's state is float32.1. in tested, got float32.3.\."
    ):
        specjax.generate(
            model, params, drafter, bad, PROMPTS[:1], LENGTHS[:1], controller_state=first.controller_state, **options
        )
    with pytest.raises(ValueError, match="state is a ThroughputState, got a Generation"):
        specjax.generate(model, params, drafter, bad, PROMPTS, LENGTHS, controller_state=first, **options)


def test_a_narrow_round_does_less_work():
    """Catches a width that computes as much as the widest, and a cache copied in or out of the choice among them. (That
    the loop holds a pass of each width is in test_tpu_adaptive.py, where it can be told from the collectives.)"""
    model, params = tiny.model("llama", 0)
    draft, draft_params = tiny.model("llama", 1, num_hidden_layers=1)
    controller = controllers.throughput(profile((1.0, 1.1, 1.2, 1.3), buckets=(0, 1, 3)))
    drafter, prompts = specjax.drafters.draft_model(draft), jnp.ones((2, 5), jnp.int32)
    lowered = lowering.lowered(model, params, drafter, draft_params, prompts, None, 400, controller=controller)
    assert not hlo.host_calls(lowered.as_text())
    program = hlo.parse(lowered.compile().as_text())
    cache = (2, 2, 512, 4)
    looped = [step.instruction for step in program.walk() if step.loops]
    shaped = [item for item in looped if any(shape.dims == cache for shape in item.shapes)]
    assert any("dynamic-update-slice" in item.text for item in shaped)
    assert not [item.text for item in shaped if item.op == "copy"]
    state = specjax.init(model, params, drafter, draft_params, prompts, max_new_tokens=400, controller=controller)

    def judged(rows, cache, draft):
        context = context_of(state.setup, state.params, rows, cache)
        scores = rounds.score(state.setup, state.params, context, draft)
        verdict = rounds.verify(state.setup, context, draft, scores)
        return rounds.commit(state.setup, cache, scores, rounds.emit(state.setup, rows, draft, scores, verdict))

    def flops(width):
        draft = specjax.Draft(
            jnp.zeros((2, width), jnp.int32), jnp.full((2,), width, jnp.int32), jnp.ones((2, width, VOCAB)) / VOCAB
        )
        compiled = jax.jit(judged).lower(state.rows, state.carry.target_cache, draft).compile()
        return compiled.cost_analysis()["flops"]

    work = [flops(width) for width in (0, 1, 3)]
    assert work[0] < 0.75 * work[1] < 0.75 * 0.75 * work[2]


def test_statistics_tell_what_was_paid_for():
    """Catches histograms that count rows for rounds, and times that leave rounds out."""
    model, params, draft, draft_params = _pair("table")
    out = specjax.generate(
        model, params, specjax.drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS, max_new_tokens=25,
        controller=SOMETIMES,
    )  # fmt: skip
    counted = jax.device_get(out.stats)
    assert stats.draft_lengths(counted).sum() == counted.rounds.sum()
    assert stats.draft_lengths(counted)[0] >= counted.by_longest[:, 0].sum()
    assert counted.by_longest.sum() == counted.rounds.sum()
    table = profile((1.0, 1.5, 2.0, 3.0), batch=3, change=0.5)
    split = stats.time_split(counted, table, context=20)
    last = np.argmax(counted.rounds)
    longest_row = counted.by_longest[last]
    turns = "".join(
        "-" if size == 0 else "d" for size in ([0, 0, 3, 1, 0, 2, 0, 0, 0, 0, 0, 3] * 9)[: longest_row.sum()]
    )
    assert counted.switches[last] == len(re.findall("-+|(?<=-)d", turns))
    late = len(re.findall("-(?=d)", turns)) * 0.5
    assert split.total == pytest.approx(longest_row @ [1.0, 1.5, 2.0, 3.0] + late)
    assert split.plain == longest_row[0]
    assert split.drafting == pytest.approx(longest_row @ [0.0, 0.05, 0.1, 0.15] + late)
    assert stats.profiled_speedup(counted, profile=table, context=20) == pytest.approx(24 / split.total)
    used = counted.accepted.sum() / (counted.by_longest @ [0, 1, 2, 3]).sum()
    assert stats.draft_utilisation(counted) == pytest.approx(used)
    with pytest.raises(ValueError, match="longest=3"):
        stats.time_split(counted, profile((1.0, 2.0)), context=20)
