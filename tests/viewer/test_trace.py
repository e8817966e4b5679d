"""Traces say what happened: the tokens and counts of `generate`, the distributions of both models, the text."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import by_plan

import specjax
from specjax import models, stats, testing, text, verify
from specjax.decode import round
from specjax.decode.stream import Chunk, Drafted, LogProb, Origin
from specjax.types import Draft, Drafter, LogProbs, Status, Verdict, Verifier
from specjax.viewer import trace
from specjax.viewer.trace import Kind

VOCAB = 9
MODEL = testing.table_model(1, VOCAB)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=VOCAB, sharpness=2.0)
DRAFT_TABLE = TABLE.at[::2].set(0.0)
PROMPTS, LENGTHS = jnp.array([[1, 2, 3], [5, 0, 0], [7, 4, 0]]), jnp.array([3, 1, 2])
IDS = [[1, 2, 3], [5], [7, 4]]
DRAFTER = specjax.drafters.draft_model(MODEL)


def _letters(ids):
    return "".join("abcdefghi"[token] for token in ids)


def _run(*, drafter=DRAFTER, rounds_per_dispatch=1, **options):
    given = (MODEL, TABLE, drafter, DRAFT_TABLE, PROMPTS, LENGTHS)
    options = {
        "max_new_tokens": jnp.array([23, 9, 14]), "capacity": 30, "controller": specjax.controllers.fixed(3), **options,
    }  # fmt: skip
    chunks = specjax.stream(*given, rounds_per_dispatch=rounds_per_dispatch, **options)
    return trace.collect(chunks, IDS, _letters), specjax.generate(*given, **options)


def test_a_trace_counts_breaks():
    """Catches rounds without a draft that are forgotten, or counted where no draft comes after them."""
    found, whole = _run(controller=by_plan([0, 0, 2, 1, 0, 3]))
    counted = trace.counts(found.rows)
    for ours, wanted in zip(counted, whole.stats, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    assert counted.switches.max() >= 4
    assert (counted.by_longest[:, 0] > (counted.switches + 1) // 2).any()  # rounds without a draft, one after another


@pytest.mark.parametrize(
    ("temperature", "rule", "rounds_per_dispatch"),
    [(0.0, "rejection", 1), (0.0, "greedy", 3), (1.0, "rejection", 3), (0.8, "block", 1), (1.0, "coupled", 2)],
)
def test_a_trace_is_what_generate_made(temperature, rule, rounds_per_dispatch):
    """Catches tokens in the wrong round, a corrected token counted as accepted, rounds of rows that had ended."""
    found, whole = _run(
        verifier=getattr(verify, rule)(), sampling=specjax.Sampling(temperature), stop_tokens=[8],
        rounds_per_dispatch=rounds_per_dispatch,
    )  # fmt: skip
    assert [[token.id for token in row.emitted()] for row in found.rows] == whole.new_tokens()
    for counted, wanted in zip(trace.counts(found.rows), whole.stats, strict=True):
        np.testing.assert_array_equal(counted, wanted)
    kinds = set()
    for row, status, new, prompt in zip(found.rows, whole.status, whole.new_tokens(), IDS, strict=True):
        assert (row.prompt, row.text) == (_letters(prompt), _letters(new))
        assert row.status == Status(int(status))
        assert row.start.target is not None
        assert row.start.target.kind == Kind.FIRST
        for one in row.rounds:
            tokens = [*one.draft, *filter(None, [one.target])]
            kinds |= {token.kind for token in tokens}
            probs = [prob for token in tokens for prob in token[3:] if prob is not None]
            assert all(0 <= prob <= 1 for prob in probs)
            assert len(probs) == 3 * len(one.draft) + 2 * (one.target is not None)
            if temperature == 0:
                ends = {Kind.ACCEPTED: 1.0, Kind.CORRECTED: 1.0, Kind.BONUS: 1.0, Kind.REJECTED: 0.0}
                assert all(token.target_prob == ends.get(token.kind, token.target_prob) for token in tokens)
                assert all(token.draft_prob == 1 for token in one.draft)
    assert kinds == set(Kind) - {Kind.FIRST}


def test_probabilities_are_those_of_the_distributions():
    """Catches a probability of the place before or after, of the other model, before the temperature where it should
    be after it and the other way round: of draft tokens, of the target's, of the one after the prompt and of those of
    rounds without a draft, and wherever a trace shows them."""
    temperature = 0.7
    found, _ = _run(sampling=specjax.Sampling(temperature), controller=by_plan([3, 0, 2, 0, 0, 3, 1]))
    tables = (TABLE / temperature, TABLE, DRAFT_TABLE / temperature)
    distributions = [np.asarray(jax.nn.softmax(table, -1)) for table in tables]
    compared = 0
    for row, prompt in zip(found.rows, IDS, strict=True):
        written = list(prompt)
        for one in (row.start, *row.rounds):
            before = [written[-1], *(token.id for token in one.draft)]
            for previous, token in zip(before, one.draft, strict=False):
                wanted = [probs[previous, token.id] for probs in distributions]
                np.testing.assert_allclose([token.target_prob, token.model_prob, token.draft_prob], wanted, atol=1e-5)
                compared += 1
            written += [token.id for token in one.emitted()]
            if one.target is not None:
                wanted = [probs[written[-2], one.target.id] for probs in distributions[:2]]
                np.testing.assert_allclose([one.target.target_prob, one.target.model_prob], wanted, atol=1e-5)
    assert compared > 20
    token = found.rows[0].rounds[0].draft[0]
    shown = trace.as_json(found)["rows"][0]["rounds"][0]["draft"][0]
    assert (shown["target_prob"], shown["model_prob"], shown["draft_prob"]) == token[3:]
    hint = f"target {token.target_prob:.4g}, target, raw {token.model_prob:.4g}, draft {token.draft_prob:.4g}"
    assert f'title="{token.kind}, {hint}"' in found._repr_html_()


def test_a_drafter_without_a_distribution_drafts_with_certainty():
    """Catches a softmax, or a crash, where `Draft.probs` is None."""
    constant = testing.constant_drafter(3)
    found, _ = _run(drafter=constant, sampling=specjax.Sampling(1.0))
    draft = [token for row in found.rows for one in row.rounds for token in one.draft]
    assert {token.id for token in draft} == {3}
    assert {token.draft_prob for token in draft} == {1.0}
    assert len({token.target_prob for token in draft}) > 3


EVERY_OTHER = specjax.Controller(
    init=lambda batch: jnp.int32(0),
    draft_len=lambda state, rows: jnp.full((rows.lengths.shape[0],), jnp.where(state % 2 == 0, 3, 0)),
    update=lambda state, info: state + 1,
    buckets=(0, 3),
)


@pytest.mark.parametrize("controller", [specjax.controllers.fixed(3), EVERY_OTHER], ids=["fixed", "every other round"])
def test_a_token_of_a_tree_is_judged_after_its_parent(controller):
    """Catches places of a tree read as those of a chain, and accepted tokens read off the draft instead of its path;
    and plain steps between trees that are told in another form."""
    parents = jnp.array([-1, -1, 0, 1, 3])

    def propose(params, state, context, plan):
        best = jnp.argsort(-params[context.rows.tokens[jnp.arange(3), context.rows.lengths - 1]], -1)
        first = best[:, :2]
        second = jnp.argmax(params[first], -1)
        third = jnp.argmax(params[second[:, 1:]], -1)
        tokens = jnp.concatenate([first[:, ::-1], second[:, ::-1], third], 1).astype(jnp.int32)
        return Draft(tokens, jnp.full((3,), len(parents)), None, parents), state

    def walk(context, draft, target):
        wanted = jnp.argmax(target.logits, -1).astype(jnp.int32)  # [B, N+1], after each node
        path, node = [], jnp.zeros((3,), jnp.int32)
        going, kept = jnp.ones((3,), bool), jnp.zeros((3,), jnp.int32)
        for _ in range(3):
            choice = jnp.take_along_axis(wanted, node[:, None], 1)
            fits = (draft.tokens == choice) & (parents[None] + 1 == node[:, None]) & going[:, None]
            going = jnp.any(fits, -1)
            place = jnp.argmax(fits, -1).astype(jnp.int32)
            path.append(place)
            kept = kept + going.astype(jnp.int32)
            node = jnp.where(going, place + 1, node)
        return Verdict(kept, jnp.take_along_axis(wanted, node[:, None], 1)[:, 0], jnp.stack(path, 1))

    drafter = Drafter(propose, num_nodes=lambda depth: 5)
    given = (MODEL, TABLE, drafter, TABLE, PROMPTS, LENGTHS)
    options = {"max_new_tokens": 20, "controller": controller, "verifier": Verifier(walk)}
    chunks = list(specjax.stream(*given, **options, sampling=specjax.Sampling(0.0)))
    plain = specjax.autoregressive(MODEL, TABLE, PROMPTS, LENGTHS, max_new_tokens=20).new_tokens()
    assert [[token for chunk in chunks for token in chunk.tokens[row]] for row in range(3)] == plain
    probs = np.asarray(jax.nn.log_softmax(TABLE, -1))
    written = [[*ids, *chunks[0].tokens[row]] for row, ids in enumerate(IDS)]
    paths = set()
    for chunk in chunks[1:]:
        for row, ended in enumerate(written):
            for drafted in filter(lambda one: one.tokens, chunk.rounds[row]):
                before = [ended[-1] if parent < 0 else drafted.tokens[parent] for parent in parents.tolist()]
                wanted = [probs[previous, token] for previous, token in zip(before, drafted.tokens, strict=False)]
                np.testing.assert_allclose([score.raw for score in drafted.target], wanted, atol=1e-5)
                kept = [drafted.tokens[place] for place in drafted.accepted]
                assert kept == chunk.tokens[row][: len(kept)]
                paths.add(tuple(drafted.accepted))
            ended += chunk.tokens[row]
    assert (1, 3, 4) in paths or (1, 3) in paths  # off the first branch


@pytest.mark.parametrize("buckets", [(5,), (0, 2, 5)])
def test_generate_pays_nothing(monkeypatch, buckets):
    """Catches what only a trace needs staying in the program of `generate`."""

    def program():
        drafter = DRAFTER._replace(read=lambda *args: DRAFTER.read(*args))  # another one, to be traced anew
        controller = specjax.controllers.fixed(5)._replace(buckets=buckets)
        options = {"max_new_tokens": 8, "sampling": specjax.Sampling(0.8, top_p=0.9), "controller": controller}
        run = jax.jit(
            lambda params, draft: specjax.generate(MODEL, params, drafter, draft, PROMPTS, LENGTHS, **options)
        )
        compiled = run.lower(TABLE, DRAFT_TABLE).compile()
        operations = re.findall(r"^\s+(?:ROOT )?%\S+ = \S+ ([a-z-]+)\(", compiled.as_text(), re.MULTILINE)
        costs = compiled.cost_analysis()
        return Counter(operations), costs["flops"], costs["bytes accessed"]

    whole = program()
    monkeypatch.setattr(round, "_draft_log_probs", lambda draft, *_: LogProbs(*[jnp.zeros(draft.tokens.shape)] * 2))
    monkeypatch.setattr(round, "at_tokens", lambda probs, tokens: jnp.zeros(tokens.shape))
    assert program() == whole


def _chunk(tokens, origins, drafted, **changes):
    none = np.zeros((1,), np.int32)
    score = changes.pop("score", LogProb(-1.0, -0.5))
    return Chunk([tokens], [origins], [[score] * len(tokens)], [drafted], none, stats.zeros(1, 3))


def _bytes(ids):
    return bytes(token for token in ids if token < 256).decode(errors="replace")


def test_characters_over_several_tokens_come_out_whole():
    """Catches replacement signs in the text, a character lost between rounds, special tokens without a name."""
    prompt, written = [*"déf ".encode()], [*"né ✓\n🙂!".encode(), 300]
    fair, place = LogProb(-1.0, -0.5), 1
    chunks = [_chunk(written[:1], [Origin.PROMPT_END], [])]
    for kept, wrong in ((2, [0x2E]), (3, []), (2, []), (2, [])):  # each ends with a token of the target's
        draft = [*written[place : place + kept], *wrong]
        drafted = Drafted(draft, [0.5] * len(draft), [fair] * len(draft), list(range(kept)), kept + 1)
        last = Origin.CORRECTED if wrong else Origin.BONUS
        chunks.append(_chunk(written[place : place + kept + 1], [Origin.ACCEPTED] * kept + [last], [drafted]))
        place += kept + 1
    assert place == len(written)

    found = trace.collect(chunks, [prompt], _bytes, name={300: "<end>"}.get)
    (row,) = found.rows
    assert (row.prompt, row.text) == ("déf ", "né ✓\n🙂!")
    assert [one.text for one in row.rounds] == ["é ", "✓\n", "", "🙂!"]
    part = "\ufffd"
    shown = ["n", part, "é", " ", part, part, "✓", "\n", part, part, part, "🙂", "!", "<end>"]
    assert [token.text for token in row.emitted()] == shown
    assert row.rounds[0].draft[2] == (0x2E, ".", Kind.REJECTED, math.exp(-0.5), math.exp(-1), 0.5)
    assert part not in found._repr_html_()
    cut = trace.collect(chunks[:4], [prompt], _bytes)
    assert cut.rows[0].text == f"né ✓\n{part}"  # what is missing is seen


def test_what_is_no_number_is_null():
    """Catches NaN in JSON, which no browser reads, and impossible probabilities."""
    bad = LogProb(float("nan"), float("inf"))
    drafted = Drafted([65, 66], [0.5, 1.0], [bad, LogProb(-float("inf"), 1e-6)], [], 1)
    chunks = [_chunk([67], [Origin.PROMPT_END], []), _chunk([68], [Origin.CORRECTED], [drafted], score=bad)]
    found = trace.collect(chunks, [[65]], _bytes, settings={"temperature": 0.5, "note": None})
    whole = json.loads(json.dumps(trace.as_json(found), allow_nan=False))
    first, second = whole["rows"][0]["rounds"][0]["draft"]
    assert (first["target_prob"], first["model_prob"], first["draft_prob"]) == (None, None, 0.5)
    assert (second["target_prob"], second["model_prob"]) == (1.0, 0.0)
    assert whole["rows"][0]["rounds"][0]["target"]["target_prob"] is None
    assert whole["settings"] == {"temperature": 0.5, "note": None}
    empty = trace.collect([], [[65]], _bytes)
    assert json.loads(json.dumps(trace.as_json(empty), allow_nan=False))["totals"]["tokens_per_round"] is None
    assert repr(empty) == "Trace of 1 row: 0 tokens, 0 rounds"


def test_a_notebook_shows_the_text_of_the_shipped_pair():
    """Catches a trace whose text is not that of `generate_text`, raw tags in it, styles for the whole page."""
    target, draft = (models.load(models.PRETRAINED / name, dtype=jnp.float32) for name in ("target", "draft"))
    tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    drafter = specjax.drafters.draft_model(draft.model)
    given = (target.model, target.params, drafter, draft.params, tokenizer, ["x = '<b>' # naïve ✓", "import numpy as"])
    found = text.trace_text(*given, max_new_tokens=20)
    assert [row.text for row in found.rows] == text.generate_text(*given, max_new_tokens=20)
    assert [row.prompt for row in found.rows] == given[-1]
    assert str(found) == "\n\n".join(row.prompt + row.text for row in found.rows)
    per_round = stats.tokens_per_round(trace.counts(found.rows))
    assert repr(found) == f"Trace of 2 rows: 40 tokens, {sum(len(row.rounds) for row in found.rows)} rounds, " + (
        f"{per_round:.2f} tokens per round"
    )
    html = found._repr_html_()
    for tag in ("<b>", "<style", "<script", "class=", "http"):
        assert tag not in html
    assert "x = &#x27;&lt;b&gt;&#x27; # naïve ✓" in html
    assert html.count('title="accepted, target ') == int(trace.counts(found.rows).accepted.sum())
