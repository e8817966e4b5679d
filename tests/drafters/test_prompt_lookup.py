"""Prompt lookup: the matches it finds, what it drafts of them, and rounds in which it finds nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
import tiny

import specjax
from specjax import controllers, drafters, testing
from specjax.aot import hlo
from specjax.drafters import matches
from specjax.drafters.matches import continuations, find_matches


def _reference_matches(text, n_min, n_max, count):
    """(place, size) by trying every place; longest first, then the most recent."""
    found = []
    for place in range(1, len(text)):
        size = 0
        while size < min(n_max, place) and text[place - 1 - size] == text[len(text) - 1 - size]:
            size += 1
        if size >= n_min:
            found.append((place, size))
    found.sort(key=lambda match: (-match[1], -match[0]))
    return (found + [(0, 0)] * count)[:count]


def _reference_draft(text, n_min, n_max, count, longest):
    best = _reference_matches(text, n_min, n_max, count)
    if best[0][1] == 0:
        return None
    following = []
    for place, size in best:
        if size == best[0][1]:
            grown = list(text)
            while len(grown) < place + longest:
                grown.append(grown[len(grown) - (len(text) - place)])
            following.append(grown[place : place + longest])
    drafted = []
    for step in range(longest):
        tokens = [each[step] for each in following]
        token = max(tokens, key=lambda token: (tokens.count(token), -tokens.index(token)))
        following = [each for each in following if each[step] == token]
        drafted.append(token)
    return drafted


@pytest.mark.parametrize(
    ("n_min", "n_max", "count", "chunk"), [(1, 3, 1, 512), (2, 5, 4, 512), (2, 4, 1, 7), (1, 6, 3, 16)]
)
def test_matches_are_those_of_trying_every_place(n_min, n_max, count, chunk, monkeypatch):
    """Catches matches lost or made up: at the edges of chunks, before the text, past its end, over the suffix itself.
    200 texts of up to 60 tokens of 3 kinds, in one batch."""
    monkeypatch.setattr(matches, "_CHUNK", chunk)
    rng = np.random.default_rng(5)
    tokens, lengths = rng.integers(0, 3, (200, 60)), rng.integers(1, 61, 200)
    found = find_matches(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.ones(200, bool), n_min=n_min, n_max=n_max,
        count=count,
    )  # fmt: skip
    for row in range(200):
        wanted = _reference_matches(tokens[row, : lengths[row]].tolist(), n_min, n_max, count)
        got = list(zip(found.places[row].tolist(), found.sizes[row].tolist(), strict=True))
        if chunk < 60:  # a search may end early, with matches of n_max tokens in later chunks
            assert all(size == n_max for _, size in wanted) or got == wanted
            assert got[0] == wanted[0]
        else:
            assert got == wanted


@pytest.mark.parametrize("pick", ["recent", "frequent"])
def test_drafts_are_what_followed(pick):
    """Catches a draft that begins a token late, forgets its period, or counts matches that are shorter."""
    rng = np.random.default_rng(6)
    tokens = jnp.asarray(rng.integers(0, 3, (64, 40)), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, 41, 64), jnp.int32)
    model, table = testing.table_model(1, 3), testing.random_table(jax.random.key(0), order=1, vocab_size=3)
    state = specjax.init(
        model, table, drafters.prompt_lookup(n_min=2, n_max=4, pick=pick), (), tokens, lengths, max_new_tokens=8,
        controller=controllers.fixed(5),
    )  # fmt: skip
    before = jax.device_get(state.rows)
    _, info = specjax.step(state)
    texts = [text[:length].tolist() for text, length in zip(before.tokens, before.lengths, strict=True)]
    wanted = [_reference_draft(text, 2, 4, 16 if pick == "frequent" else 1, 5) for text in texts]
    assert {None} < {tuple(draft) if draft else None for draft in wanted}  # some find nothing
    for drafted, length, draft in zip(info.draft_tokens.tolist(), info.draft_lengths.tolist(), wanted, strict=True):
        assert drafted[:length] == (draft or [])


def test_continuations_go_on_periodically():
    """Catches a draft cut where the text ends: "abc abc" goes on with "abc" for as long as is asked."""
    text = jnp.array([[7, 1, 2, 3, 1, 2, 3, 0, 0]])
    found = find_matches(text, jnp.array([7]), jnp.array([True]), n_min=1, n_max=3)
    assert continuations(text, jnp.array([7]), found.places, 7).tolist() == [[[1, 2, 3, 1, 2, 3, 1]]]


def test_a_round_without_a_match_is_a_plain_step():
    """Catches a pass over K + 1 places for nothing, with a controller that always drafts; and a row whose rounds or
    tokens depend on whether others find something."""
    model, params = tiny.model("table")
    drafter, prompts = drafters.prompt_lookup(n_min=3), jnp.array([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 1, 2, 3, 1]])
    options = {"max_new_tokens": 12, "controller": controllers.fixed(4), "sampling": specjax.Sampling(1.0)}
    together = specjax.generate(model, params, drafter, (), prompts, seeds=jnp.array([3, 4]), **options)
    for row in range(2):
        alone = specjax.generate(
            model, params, drafter, (), prompts[row : row + 1], seeds=jnp.array([3 + row]), **options
        )
        assert alone.new_tokens()[0] == together.new_tokens()[row]
    counted = specjax.generate(model, params, drafter, (), prompts[:1], **options).stats
    assert counted.by_longest[0, 0] > 0  # plain rounds
    assert counted.by_longest[0].sum() == counted.rounds[0] == 11 - counted.accepted.sum()


def test_a_search_costs_what_the_text_is_long():
    """Catches a search over the whole buffer, and one that leaves the device: in the compiled loop only the
    writing of new tokens makes integers or truth values of the size of the buffer, which holds 60,010 tokens a row."""
    model, params = tiny.model("llama")
    drafter, prompts = drafters.prompt_lookup(), jnp.ones((2, 5), jnp.int32)
    lowered = lowering.lowered(model, params, drafter, (), prompts, None, 60_000, controller=controllers.fixed(4))
    assert not hlo.host_calls(lowered.as_text())
    program = hlo.parse(lowered.compile().as_text())
    made = [step.instruction for step in program.walk() if step.loops and step.instruction.op == "fusion"]
    large = [
        item
        for item in made
        for shape in item.shapes
        if shape.dtype != "f32" and np.prod(shape.dims, initial=1) > 10_000
    ]
    assert large
    assert all(item.scope.endswith("scatter") for item in large)


def test_a_buffer_too_large_for_a_match_as_one_number_is_refused():
    """Catches a match's place and size that wrap in int32."""
    tokens = jax.ShapeDtypeStruct((1, 2**25), jnp.int32)
    search = functools.partial(find_matches, n_min=1, n_max=64)
    with pytest.raises(
        ValueError, match="with n_max=64 a row may hold 33038207 tokens at most, this buffer has 33554432"
    ):
        jax.eval_shape(search, tokens, jnp.ones(1, jnp.int32), jnp.ones(1, bool))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_min": 5, "n_max": 3}, "n_min is 5 and n_max is 3: matches of n_max tokens are tried first"),
        ({"n_min": 0}, "n_min must be in 1..64, got 0"),
        ({"n_max": 65}, "n_max must be in 1..64, got 65"),
        ({"pick": "best"}, 'pick must be "recent" or "frequent", got \'best\''),
    ],
)
def test_bad_arguments_say_what_is_wrong(given, said):
    """Catches a lookup that can never match."""
    with pytest.raises(ValueError, match=said):
        drafters.prompt_lookup(**given)
