"""Stores: what they find, what they draft of it and with which probabilities, what they learn and forget."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import Sampling, controllers, drafters, testing
from specjax.drafters.matches import END
from specjax.drafters.sorted_texts import append_texts, find_longest, sort_on_device, sort_texts

VOCAB = 3
MODEL = testing.table_model(2, VOCAB)
TABLE = testing.random_table(jax.random.key(11), order=2, vocab_size=VOCAB, sharpness=1.5)


def _texts(count, seed=0, longest=30, vocab_size=VOCAB):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size).tolist() for size in rng.integers(0, longest, count)]


def _matches(texts, suffix, depth):
    """(matched tokens, what follows) of each place of each text."""
    found = []
    for text in texts:
        for place in range(1, len(text)):
            size = 0
            while size < min(depth, place, len(suffix)) and text[place - 1 - size] == suffix[-1 - size]:
                size += 1
            found.append((size, text[place:]))
    return found


@pytest.mark.parametrize("size", [400, 1000])
def test_the_longest_match_and_all_places_that_have_it(size):
    """Catches a search that stops beside the place, at either end, or matches across two texts. 300 suffixes."""
    texts, depth = _texts(40), 5
    stored = sort_texts(texts, size, depth)
    rows = _texts(300, seed=1, longest=12)
    suffixes = np.full((300, depth), -2, np.int32)
    for row, suffix in zip(suffixes, rows, strict=True):
        last = suffix[: -depth - 1 : -1]
        row[: len(last)] = last
    sizes, first, count = jax.jit(lambda x: find_longest(stored, x, n_min=1))(jnp.asarray(suffixes))
    held = drafters.Store(stored).unpack()
    assert [text for text in texts if text][-len(held) + 1 :] == held[1:]  # the oldest may have lost its beginning
    for row in range(300):
        found = _matches(held, rows[row], depth)
        best = max(size for size, _ in found)
        assert sizes[row] == best
        if best:
            places = np.asarray(stored.order)[int(first[row]) : int(first[row] + count[row])]
            tokens = np.asarray(stored.tokens)
            assert sorted(tokens[places].tolist()) == sorted(rest[0] for size, rest in found if size == best)
        else:
            assert count[row] == 0


def test_sorting_on_the_device_is_sorting_on_the_host():
    """Catches an order of its own, and an END that is taken for a token."""
    host = sort_texts(_texts(20), 200, 4)
    device = jax.jit(lambda tokens: sort_on_device(tokens, 4))(host.tokens)
    assert device.count == host.count
    count = int(host.count)
    assert sorted(host.order[:count].tolist()) == sorted(device.order[:count].tolist())
    padded = np.concatenate([np.full(4, END), host.tokens])
    before = [tuple(padded[place : place + 4][::-1].tolist()) for place in device.order[:count].tolist()]
    assert before == sorted(before)


def test_texts_are_added_at_the_end_and_the_oldest_go():
    """Catches texts that run into each other, and a buffer that keeps the old and drops the new."""
    tokens = jnp.full((12,), END, jnp.int32)
    texts = jnp.array([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]])
    tokens = append_texts(tokens, texts, jnp.array([3, 0, 2]))
    assert tokens.tolist() == [END] * 5 + [1, 2, 3, END, 5, 6, END]
    tokens = append_texts(tokens, texts + 6, jnp.array([4, 1, 1]))
    assert tokens.tolist() == [5, 6, END, 7, 8, 9, 6, END, 10, END, 11, END]


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_drafts_by_counts_follow_the_distribution(rule):
    """Catches probabilities other than those that tokens were drawn from, over several rounds, rounds without a match
    among them. 20,000 texts of 4 tokens at three settings, K = 2; false alarms 1e-6."""
    store = drafters.Store.build(_texts(30, seed=3), depth=3)
    drafter = drafters.suffix_store(n_min=2, vocab_size=VOCAB)
    settings = (Sampling(1.0, top_p=1.0), Sampling(0.7, top_p=0.9))
    sampling = jax.tree.map(lambda *values: jnp.repeat(jnp.array(values), 20_000), *settings)
    out = specjax.generate(
        MODEL, TABLE, drafter, store, jnp.tile(jnp.array([[1, 2]]), (40_000, 1)), key=jax.random.key(5),
        max_new_tokens=4, sampling=sampling, verifier=getattr(specjax.verify, rule)(), controller=controllers.fixed(2),
    )  # fmt: skip
    assert 0.1 < specjax.stats.acceptance_rate(out.stats) < 0.95
    for tokens, setting in zip(np.split(np.asarray(out.tokens), 2), settings, strict=True):
        probs = testing.exact_sequence_probs(MODEL, TABLE, [1, 2], 4, sampling=setting)
        testing.assert_same_distribution(testing.count_sequences(tokens, 2, 4, VOCAB), probs)


@pytest.mark.parametrize("draw", ["counts", "mode"])
def test_the_kit_finds_nothing_wrong(draw):
    """Catches a drafter that misstates its distribution, reads its neighbours, or changes a token."""
    store = drafters.Store.build(_texts(30, seed=3), depth=3)
    drafter = drafters.suffix_store(n_min=1, draw=draw, vocab_size=VOCAB, recent=64)
    assert len(testing.check_drafter(drafter, store, target=MODEL, target_params=TABLE, samples=500)) == 5


def test_a_call_is_learnt_by_the_next():
    """Catches a store that forgets what was written, or that finds it within the call, where rows would meet. A second
    call with the same prompts is drafted whole: greedy, so it says the same. One program serves both."""
    store = drafters.Store.build([[0, 0]], size=16, depth=6)
    drafter = drafters.suffix_store(n_min=1, draw="mode", recent=256)
    model, table = testing.table_model(2, 50), testing.random_table(jax.random.key(0), order=2, vocab_size=50)
    prompts = jnp.array([[1, 2, 3], [7, 8, 9]])
    learnt = jnp.full((256,), END, jnp.int32)

    def call(learnt):
        return specjax.generate(
            model, table, drafter, store, prompts, max_new_tokens=21, controller=controllers.fixed(4),
            drafter_state=learnt,
        )  # fmt: skip

    first = call(learnt)
    second = call(first.drafter_state)
    assert second.new_tokens() == first.new_tokens()
    assert first.stats.accepted.sum() < second.stats.accepted.sum()
    assert second.stats.rounds.tolist() == [4, 4]  # 1 + 4 * 5 tokens
    with pytest.raises(ValueError, match="drafter_state does not fit"):
        call(jnp.zeros((8,), jnp.int32))


@pytest.mark.parametrize("draw", ["counts", "mode"])
def test_ids_that_the_target_does_not_have_end_a_draft(draw):
    """Catches a draft of ids past the vocabulary, from a store that was made with another tokenizer. The store says 9
    after a 1 as often as 2, and only 9 after a 2."""
    store = drafters.Store.build([[1, 9], [1, 2, 9, 9]] * 4)
    drafter = drafters.suffix_store(n_min=1, draw=draw, vocab_size=VOCAB)
    prompts = jnp.tile(jnp.array([[0, 1], [1, 2]]), (20, 1))
    state = specjax.init(
        MODEL, TABLE, drafter, store, prompts, max_new_tokens=8, sampling=Sampling(1.0), controller=controllers.fixed(3)
    )
    after = np.asarray(state.rows.tokens)[:, 2]  # the token that the prompt gave
    _, info = specjax.step(state)
    assert {1, 2} <= set(after.tolist())
    for token, length, drafted in zip(after, info.draft_lengths.tolist(), info.draft_tokens.tolist(), strict=True):
        assert length == (token == 1)
        assert drafted[:length] == [2][:length]


def test_added_texts_are_found_and_memory_is_bounded():
    """Catches a store that grows, and one whose old texts stay for new ones."""
    store = drafters.Store.build([[1, 2, 3]], size=8)
    more = store.add([[4, 5, 6, 7]])
    assert more.unpack() == [[2, 3], [4, 5, 6, 7]]
    assert (len(store), len(more), more.texts.size) == (3, 6, 8)
    assert jax.tree.structure(store) == jax.tree.structure(more)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"texts": []}, "a store needs a text of two tokens or more"),
        ({"texts": [[1], [2]]}, "a store needs a text of two tokens or more: .* The 2 texts given have none"),
        ({"texts": [[1, -2]]}, r"texts\[0\] holds ids outside 0..2\*\*31 - 2: -2 to 1"),
        ({"texts": ["abc"]}, r"texts\[0\] must be a list of token ids, got a str: encode text first"),
        ({"texts": "abc"}, "texts is a string: pass lists of token ids"),
        ({"texts": [1, 2]}, r"texts\[0\] is one id, 1: texts are lists of ids"),
        ({"texts": [[1, 2]], "tokenizer": 5}, "tokenizer must be a string that names it, got a int"),
        ({"texts": [[1, 2]], "size": 1}, "size must be in 2..268435456, got 1"),
        ({"texts": [[1, 2]], "depth": 0}, "depth must be in 1..64, got 0"),
    ],
)
def test_bad_texts_say_what_is_wrong(given, said):
    """Catches a store that can find nothing."""
    texts = given.pop("texts")
    with pytest.raises(ValueError, match=said):
        drafters.Store.build(texts, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"pass vocab_size=model\.vocab_size"),
        ({"draw": "best"}, 'draw must be "counts" or "mode", got \'best\''),
        ({"draw": "mode", "n_min": 0}, "n_min must be in 1..64"),
        ({"draw": "mode", "recent": -1}, "recent must be in 0..1048576"),
    ],
)
def test_bad_arguments_say_what_is_wrong(given, said):
    """Catches an argument that fails deep inside."""
    with pytest.raises(ValueError, match=said):
        drafters.suffix_store(**given)


def test_a_saved_store_is_the_same_and_the_old_one_stays_until_then(tmp_path, monkeypatch):
    """Catches numbers lost on the way, a save that removes the old store first, and folders that are something else."""
    first, second = (drafters.Store.build(_texts(20, seed=seed), depth=4, tokenizer="t") for seed in (1, 2))
    drafters.save_store(first, tmp_path / "store")
    loaded = drafters.load_store(tmp_path / "store")
    assert loaded.tokenizer == "t"
    assert jax.tree.structure(loaded) == jax.tree.structure(first)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(first), strict=True))

    killed = f"""if True:
        import os
        from orbax.checkpoint._src.path import atomicity
        from specjax import drafters
        for name in ("AtomicRenameTemporaryPath", "CommitFileTemporaryPath"):
            async def finalize(*_, **__): os._exit(9)
            setattr(getattr(atomicity, name), "finalize", finalize)
        drafters.save_store(drafters.load_store({str(tmp_path / "store")!r}), {str(tmp_path / "store")!r})
    """
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert jax.tree.leaves(drafters.load_store(tmp_path / "store"))[0].tolist() == first.texts.tokens.tolist()
    drafters.save_store(second, tmp_path / "store")
    assert jax.tree.leaves(drafters.load_store(tmp_path / "store"))[0].tolist() == second.texts.tokens.tolist()

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no store, or a damaged one \(it holds no finished store\)"):
        drafters.load_store(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="none is no folder: make a store"):
        drafters.load_store(tmp_path / "none")
    about = next((tmp_path / "store").rglob("about/metadata"))
    about.write_text(about.read_text().replace('"tokens": ', '"tokens": 1'))
    with pytest.raises(ValueError, match="its tokens are not those that were written"):
        drafters.load_store(tmp_path / "store")
