"""The loop: identity with greedy decoding, independence of rows, statuses, and no recompilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
import tiny
from jax._src import test_util as jtu

import specjax
from specjax import testing
from specjax.aot import hlo
from specjax.decode import arguments, prefill
from specjax.types import Controller, Status

VOCAB = 13
TABLE_MODEL = testing.table_model(2, VOCAB)
TABLE = testing.random_table(jax.random.key(0), order=2, vocab_size=VOCAB, sharpness=2.0)
BAD_TABLE = testing.random_table(jax.random.key(1), order=2, vocab_size=VOCAB)
PROMPTS = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0]])
LENGTHS = jnp.array([4, 1, 2])


def _llama(seed, **changes):
    return tiny.model("llama", seed, **changes)


def _pairs():
    yield (
        "table",
        TABLE_MODEL,
        TABLE,
        TABLE_MODEL,
        jnp.where(jax.random.uniform(jax.random.key(5), TABLE.shape) < 0.5, TABLE, BAD_TABLE),
    )
    yield "llama", *_llama(0), *_llama(1, num_hidden_layers=1)
    yield "llama drafting for itself", *_llama(0), *_llama(0)
    yield "gpt2", *tiny.model("gpt2", 3), *_llama(1)


PAIRS = {name: parts for name, *parts in _pairs()}


@pytest.mark.parametrize(("temperature", "rule"), [(0.0, "rejection"), (1.0, "rejection"), (1.0, "coupled")])
def test_a_model_drafting_for_itself_is_always_right(temperature, rule):
    """Known bug 5: a draft cache off by one still gives the right text, only fewer tokens a round. K + 1 here; so does
    a draft drawn with other noise than the coupled verifier's. And at the end of a row no token is drafted that could
    not be emitted: of 5, 4, 2 and 1 tokens left the last comes from the target."""
    model, params, draft, draft_params = PAIRS["llama drafting for itself"]
    prompts, lengths = (jnp.concatenate([both, both[:1]]) for both in (PROMPTS, LENGTHS))
    out = specjax.generate(
        model, params, specjax.drafters.draft_model(draft), draft_params, prompts, lengths,
        max_new_tokens=jnp.array([31, 30, 28, 27]), controller=specjax.controllers.fixed(4),
        sampling=specjax.Sampling(temperature), verifier=getattr(specjax.verify, rule)(),
    )  # fmt: skip
    assert specjax.stats.acceptance_rate(out.stats) == 1.0
    assert out.stats.rounds.tolist() == [6, 6, 6, 6]  # 1 + 6 * 5 tokens at the most
    assert out.stats.emitted.tolist() == [30, 29, 27, 26]
    assert out.stats.drafted.sum(1).tolist() == [24, 23, 21, 20]


def test_caches_hold_verified_tokens_only():
    """Known bug 5: lengths that count unverified drafts. After every round: all tokens but the last (target), all but
    the last two (draft)."""
    model, params, draft, draft_params = PAIRS["llama"]
    state = specjax.init(
        model, params, specjax.drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS, max_new_tokens=12,
        controller=specjax.controllers.fixed(3),
    )  # fmt: skip
    for _ in range(4):
        before = np.asarray(state.rows.lengths)
        state, info = specjax.step(state)
        assert (state.rows.lengths == before + info.num_emitted).all()
        assert (info.num_accepted <= info.draft_lengths).all()
        assert (state.carry.target_cache.lengths == state.rows.lengths - 1).all()
        assert (state.carry.drafter_state.cache.lengths == state.rows.lengths - 2).all()


def test_a_second_call_compiles_nothing():
    """Catches closures made anew and values that became static. Everything that may change without a new shape does:
    known bug 10 is stop tokens read once for ever."""
    model, params, draft, draft_params = PAIRS["table"]

    def run(key, params, stop, temperature, limit, prompts=PROMPTS):
        return specjax.generate(
            model, params, specjax.drafters.draft_model(draft), draft_params, prompts, LENGTHS,
            key=jax.random.key(key), stop_tokens=np.array(stop), sampling=specjax.Sampling(temperature, top_p=0.9),
            max_new_tokens=limit, controller=specjax.controllers.fixed(3), verifier=specjax.verify.rejection(),
            capacity=40,
        )  # fmt: skip

    other_params, other_prompts = params + 1, PROMPTS + 1
    plain = specjax.autoregressive(model, other_params, other_prompts, LENGTHS, max_new_tokens=30).new_tokens()
    run(0, params, [plain[0][1]], 0.5, 20)
    with jtu.count_jit_compilation_cache_miss() as misses:
        second = run(1, other_params, [-1], 0.0, 30, other_prompts)
    assert misses() == 0
    assert second.new_tokens() == plain  # the first call's stop token, which is in it, stops nothing now


def test_inside_the_callers_jit_and_vmap():
    """Catches anything that needs concrete values, and parameters captured instead of passed."""
    model, params, draft, draft_params = PAIRS["table"]
    drafter = specjax.drafters.draft_model(draft)
    traces = []

    @jax.jit
    def evaluate(params, draft_params, prompts, lengths, limit):
        traces.append(1)
        return specjax.generate(
            model, params, drafter, draft_params, prompts, lengths, max_new_tokens=limit, capacity=24
        )

    for scale in (1.0, -1.0):
        out = evaluate(params * scale, draft_params, PROMPTS, LENGTHS, jnp.int32(15))
        plain = specjax.autoregressive(model, params * scale, PROMPTS, LENGTHS, max_new_tokens=15)
        assert out.new_tokens() == plain.new_tokens()
    assert len(traces) == 1

    tables = jnp.stack([params, -params])
    many = jax.vmap(evaluate, (0, None, None, None, None))(tables, draft_params, PROMPTS, LENGTHS, jnp.int32(15))
    for index in range(2):
        plain = specjax.autoregressive(model, tables[index], PROMPTS, LENGTHS, max_new_tokens=15, capacity=24)
        assert (many.tokens[index] == plain.tokens).all()


@pytest.mark.parametrize("draft_len", [1, 4])
def test_stop_tokens_end_a_row_wherever_they_fall(draft_len):
    """Catches tokens emitted after a stop token that was accepted in the middle of a draft, or counted there: the model
    drafts for itself, so every token whose turn comes is accepted, and what is behind the stop token has no turn."""
    model, params, draft, draft_params = PAIRS["llama drafting for itself"]
    stops = jnp.array([[9, -1], [2, 11], [0, 4]])
    plain = specjax.autoregressive(model, params, PROMPTS, LENGTHS, max_new_tokens=40, stop_tokens=stops)
    out = specjax.generate(
        model, params, specjax.drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS, max_new_tokens=40,
        stop_tokens=stops, controller=specjax.controllers.fixed(draft_len),
    )  # fmt: skip
    assert out.new_tokens() == plain.new_tokens()
    assert out.status.tolist() == plain.status.tolist()
    for row, text in enumerate(out.new_tokens()):
        hit = [token in stops[row].tolist() for token in text]
        assert not any(hit[:-1])
        assert hit[-1] == (out.status[row] == Status.STOPPED)
    assert (out.status == Status.STOPPED).any()
    emitted = np.array([len(text) - 1 for text in out.new_tokens()])  # by rounds: the first is from the prompt
    rounds, last = np.divmod(emitted, draft_len + 1)
    place = np.arange(draft_len)[None]
    wanted = rounds[:, None] + (place < last[:, None])
    ends_in_draft = (np.asarray(out.status) == Status.STOPPED) & (last > 0)
    assert ends_in_draft.any()
    whole = np.asarray(out.status) == Status.STOPPED  # rows that reach their limit end with a token of the target's
    np.testing.assert_array_equal(out.stats.accepted[whole], wanted[whole])
    np.testing.assert_array_equal(out.stats.tested, out.stats.accepted)
    assert specjax.stats.token_acceptance(out.stats) == 1.0
    np.testing.assert_array_equal(out.stats.emitted, emitted)


def test_faults_end_their_row_and_no_other():
    """Catches NaN leaking between rows, and tokens lost or invented around a fault."""
    model, params, draft, draft_params = PAIRS["table"]
    drafter = specjax.drafters.draft_model(draft)
    clean = specjax.autoregressive(model, params, PROMPTS, LENGTHS, max_new_tokens=20).new_tokens()
    fatal = clean[0][6:8]  # the context after the 8th token of row 0
    for poison in (jnp.nan, jnp.inf, -jnp.inf):
        broken = params.at[tuple(fatal)].set(poison)
        plain = specjax.autoregressive(model, broken, PROMPTS, LENGTHS, max_new_tokens=20)
        for draft_len in (1, 5):
            out = specjax.generate(
                model, broken, drafter, draft_params, PROMPTS, LENGTHS, max_new_tokens=20,
                controller=specjax.controllers.fixed(draft_len),
            )  # fmt: skip
            assert out.new_tokens() == plain.new_tokens()
            assert out.status.tolist() == plain.status.tolist()
        assert out.status[0] == Status.NON_FINITE
        assert out.new_tokens()[0] == clean[0][: len(out.new_tokens()[0])]
        whole = [row for row in range(3) if out.status[row] == Status.LENGTH]
        assert all(out.new_tokens()[row] == clean[row] for row in whole)


def test_a_full_cache_is_a_status():
    """Catches writes that clamp at the end of the buffer and overwrite live slots."""
    model, params, draft, draft_params = PAIRS["llama"]
    out = specjax.generate(
        model, params, specjax.drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS, max_new_tokens=30,
        capacity=20, controller=specjax.controllers.fixed(5),
    )  # fmt: skip
    plain = specjax.autoregressive(model, params, PROMPTS, LENGTHS, max_new_tokens=30)
    assert out.status.tolist() == [Status.CACHE_FULL] * 3
    assert out.lengths.tolist() == [20] * 3
    for new, wanted in zip(out.new_tokens(), plain.new_tokens(), strict=True):
        assert new == wanted[: len(new)]


def test_bad_prompts_hidden_in_traced_data():
    """Catches silent garbage: an empty prompt, a length past the width, an id outside the vocabulary."""
    model, params, draft, draft_params = PAIRS["table"]
    drafter = specjax.drafters.draft_model(draft)
    prompts = jnp.array([[1, 2], [1, 2], [1, VOCAB], [3, VOCAB]])
    lengths = jnp.array([0, 3, 2, 1])
    out = jax.jit(lambda p, n: specjax.generate(model, params, drafter, draft_params, p, n, max_new_tokens=4))(
        prompts, lengths
    )
    assert out.status.tolist() == [Status.BAD_PROMPT] * 3 + [Status.LENGTH]
    assert [len(row) for row in out.new_tokens()] == [0, 0, 0, 4]
    assert "empty" in Status.BAD_PROMPT.describe()


@pytest.mark.parametrize("rows", [1, 3])
def test_no_host_in_the_compiled_loop_and_no_cache_copied(rows, monkeypatch):
    """Catches callbacks, and a copy of a cache-shaped buffer inside a loop: of rounds, of tokens, of prompt chunks."""
    model, params, draft, draft_params = PAIRS["llama"]
    monkeypatch.setattr(prefill, "CHUNK", 8)  # a prompt of several chunks
    jax.clear_caches()
    prompts, drafter = jnp.ones((rows, 30), jnp.int32), specjax.drafters.draft_model(draft)
    controller = specjax.controllers.fixed(3)
    for lowered in (
        lowering.lowered(model, params, drafter, draft_params, prompts, None, 400, controller=controller),
        lowering.lowered_plainly(model, params, prompts, None, 400),
    ):
        assert not hlo.host_calls(lowered.as_text())
        program = hlo.parse(lowered.compile().as_text())
        cache = (rows, 2, 512, 4)  # 430 tokens and the slack of a round, in steps of 128
        looped = [step.instruction for step in program.walk() if step.loops]
        shaped = [item for item in looped if any(shape.dims == cache for shape in item.shapes)]
        assert any("dynamic-update-slice" in item.text for item in shaped)  # it is written, so it was found
        assert not [item.text for item in shaped if item.op == "copy"]
    jax.clear_caches()


def _request(model, prompts, lengths, max_new_tokens):
    return arguments.request(
        model, prompts, lengths, key=None, max_new_tokens=max_new_tokens, sampling=specjax.Sampling(),
        stop_tokens=(), seeds=None, capacity=None,
    )  # fmt: skip


def _saw(longest: int) -> Controller:
    """Draft lengths 0, 1, ..., longest in turn, different for every row."""
    return Controller(
        init=lambda batch: jnp.arange(batch, dtype=jnp.int32),
        draft_len=lambda state, rows: state % (longest + 1),
        update=lambda state, info: state + 1,
        buckets=tuple(range(longest + 1)),
    )


@pytest.mark.parametrize("pair", ["table", "llama"])
def test_draft_lengths_may_vary_by_row_and_round(pair):
    """Catches a draft cache that falls behind when a row drafts little, or nothing, while others draft on."""
    model, params, draft, draft_params = PAIRS[pair]
    plain = specjax.autoregressive(model, params, PROMPTS, LENGTHS, max_new_tokens=25)
    drafter = specjax.drafters.draft_model(draft)
    controller = _saw(4)
    out = specjax.generate(
        model, params, drafter, draft_params, PROMPTS, LENGTHS, max_new_tokens=25, controller=controller
    )
    assert out.new_tokens() == plain.new_tokens()
    again = specjax.generate(
        model, params, drafter, draft_params, PROMPTS, LENGTHS, max_new_tokens=25, controller=controller,
        controller_state=out.controller_state,
    )  # fmt: skip
    assert (again.controller_state > out.controller_state).all()


def test_drafting_may_stop_early():
    """Catches a stopping rule that is ignored, or that changes the text."""
    model, params, _, draft_params = PAIRS["llama drafting for itself"]
    drafter = specjax.drafters.draft_model(model)
    unsure = Controller(
        init=lambda batch: jnp.zeros((batch,), jnp.int32),
        draft_len=lambda state, rows: state + 6,
        update=lambda state, info: state,
        buckets=(0, 2, 6),
        keep_drafting=lambda state, drawn, step: jnp.max(drawn.probs, -1) > 0.25,
    )
    options = {"max_new_tokens": 40, "sampling": specjax.Sampling(1.0)}
    out = specjax.generate(model, params, drafter, draft_params, PROMPTS, LENGTHS, controller=unsure, **options)
    assert 0 < int(out.stats.drafted[:, 1].sum()) < int(out.stats.drafted[:, 0].sum())
    assert specjax.stats.acceptance_rate(out.stats) == 1.0  # it drafts for itself: every drafted token stays
