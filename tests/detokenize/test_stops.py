"""Where texts end: at the checkpoint's end tokens, before stop strings; and what is not printed."""

from __future__ import annotations

import json
import logging
import random
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spelt
import tiny

import specjax
from specjax import models, testing, text
from specjax.cli.load_pair import Pair
from specjax.detokenize.stop_strings import StopFinder
from specjax.types import Status
from specjax.viewer import trace
from specjax.viewer.trace import Kind

TOKENIZER = spelt.byte_fallback()
VOCAB = TOKENIZER.get_vocab_size()
MODEL = testing.table_model(1, VOCAB)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=VOCAB)
DRAFTER = specjax.drafters.draft_model(MODEL)
WIDTH = 24  # tokens of each prompt below
SPECIAL = "</s>"


def _again(logits, tokens, length):
    """Writes the prompt once more, token by token."""
    return jnp.where(jnp.arange(VOCAB) == tokens[length - WIDTH], 0.0, -jnp.inf)


OPTIONS = {"processor": _again, "capacity": 64}


def _given(stop_tokens=()):
    return MODEL._replace(stop_tokens=stop_tokens), TABLE, DRAFTER, TABLE, TOKENIZER


def _padded(content):
    """With as many letters before it as make a prompt of WIDTH tokens."""
    return "x" * (WIDTH - len(TOKENIZER.encode(content).ids)) + content


def _checkpoint(folder, config_end, generation_end):
    """A tiny checkpoint with these `eos_token_id` in its two files."""
    models.save(models.random(tiny.config("llama", eos_token_id=config_end), jax.random.key(0)), folder)
    if generation_end != "no file":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_end}))
    return models.load(folder)


@pytest.mark.parametrize(
    ("config_end", "generation_end", "wanted"),
    [
        (2, "no file", [2]),
        (2, [5, 2, 7], [2, 5, 7]),
        ([3, 4], 5, [3, 4, 5]),
        (None, 6, [6]),
        (2, None, [2]),
        (None, None, []),
        (2, [7, tiny.VOCAB, 90_000, -1], [2, 7]),
    ],
)
def test_stop_tokens_come_from_both_files(config_end, generation_end, wanted, tmp_path, caplog):
    """Catches an instruct model that does not stop as only config.json is read, a list that is not understood, and a
    checkpoint refused for an id past its vocabulary."""
    with caplog.at_level(logging.WARNING, "specjax"):
        loaded = _checkpoint(tmp_path / "model", config_end, generation_end)
    assert (loaded.stop_tokens.tolist(), loaded.stop_tokens.dtype) == (wanted, np.int32)
    assert loaded.model.stop_tokens == tuple(wanted)
    assert Pair(loaded, loaded, None).stop_tokens().tolist() == wanted
    assert models.quantize(loaded).stop_tokens.tolist() == wanted
    assert ("cannot be emitted" in caplog.text) == (generation_end == [7, tiny.VOCAB, 90_000, -1])
    models.save(loaded, tmp_path / "copy")
    assert models.load(tmp_path / "copy").stop_tokens.tolist() == wanted


@pytest.mark.parametrize("wrong", ["</s>", [2, "</s>"], 2.5, True])
def test_an_end_that_is_no_id_is_refused_by_name(wrong, tmp_path):
    """Catches a crash from deep inside, or a text without an end."""
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be"):
        _checkpoint(tmp_path / "model", 2, wrong)


def _all_functions(given, texts, **options):
    """The texts that each of the three functions makes."""
    arguments: Any = (*given, texts)
    whole = text.generate_text(*arguments, **options)
    rows = [""] * len(texts)
    for piece in text.stream_text(*arguments, **options):
        rows[piece.row] += piece.text
        assert whole[piece.row].startswith(rows[piece.row])
    found = text.trace_text(*arguments, **options)
    assert rows == whole == [row.text for row in found.rows]
    return whole, found


def test_texts_end_at_the_checkpoint_s_end():
    """Catches texts that run on past the end of the checkpoint, unlike those of the command line, and an end that is
    printed; () asks for no end."""
    texts = [_padded("one" + SPECIAL + "two"), _padded("more text" + SPECIAL)]
    whole, found = _all_functions(_given((spelt.END,)), texts, **OPTIONS, max_new_tokens=WIDTH)
    assert whole == [texts[0].split(SPECIAL)[0], texts[1].removesuffix(SPECIAL)]
    assert [row.status for row in found.rows] == [Status.STOPPED] * 2
    assert [row.emitted()[-1].text for row in found.rows] == [SPECIAL] * 2  # a token is called by its name
    explicit, _ = _all_functions(_given(), texts, **OPTIONS, max_new_tokens=WIDTH, stop_tokens=[spelt.END])
    assert explicit == whole
    shown, _ = _all_functions(
        _given((spelt.END,)), texts, **OPTIONS, max_new_tokens=WIDTH, stop_tokens=(), skip_special_tokens=False
    )
    assert shown == texts


def test_stop_strings_cut_the_text():
    """Catches a stop string that is part of the text, is missed where it lies in two tokens or in an accepted
    draft, and rows that go on after it or are cut with another row."""
    texts = [_padded("ab END é, c###d"), _padded("no stop here 🙂"), _padded("#  ###END")]
    for stop, wanted in (
        ("END", [texts[0].split("END")[0], texts[1], texts[2].split("END")[0]]),
        (["###", "D é"], [texts[0].split("D é")[0], texts[1], texts[2].split("###")[0]]),
        ("🙂", [texts[0], texts[1].split("🙂")[0], texts[2]]),
        (["x"], ["", "", ""]),
        (["absent", "END é, c###dx"], texts),
    ):
        whole, found = _all_functions(_given(), texts, **OPTIONS, max_new_tokens=WIDTH, stop=stop)
        assert whole == wanted
        stopped = [text_ != given for text_, given in zip(wanted, texts, strict=True)]
        assert [row.status == Status.STOPPED for row in found.rows] == stopped
        kinds = [token.kind for row in found.rows for one in row.rounds for token in one.draft]
        assert (Kind.UNUSED in kinds) <= any(stopped)
        for row in found.rows:
            assert trace.counts([row]).emitted.sum() + 1 == len(row.emitted())


def test_generation_ends_when_all_rows_have_stopped(monkeypatch):
    """Catches a device that goes on to max_new_tokens after the last stop string."""
    module, dispatched = sys.modules["specjax.decode.stream"], []  # its name in specjax is the function's
    run = module.dispatch
    monkeypatch.setattr(module, "dispatch", lambda *args: dispatched.append(1) or run(*args))
    given, texts = _given(), [_padded("END"), _padded("END ab")]
    options = {**OPTIONS, "capacity": 1024, "max_new_tokens": 900}
    cut = [one.split("END")[0] for one in texts]
    assert text.generate_text(*given, texts, **options, stop="END", pad_token=1, rounds_per_test=2) == cut
    assert len(dispatched) < 6
    assert not [piece for piece in text.stream_text(*given, texts, **options, stop="END") if "END" in piece.text]
    assert len(dispatched) < 20


def test_a_stop_string_is_found_however_the_text_comes():
    """Catches text that is shown and turns out to begin a stop string, and an end that depends on rounds or tokens."""
    rng = random.Random(2)
    stopped = 0
    for _ in range(20_000):
        texts = ["".join(rng.choices("ab ", k=rng.randrange(4))) for _ in range(rng.randrange(14))]
        stop = ["".join(rng.choices("ab ", k=rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        whole = "".join(texts)
        wanted = whole[: min((whole.find(each) for each in stop if each in whole), default=len(whole))]
        finder, shown, place = StopFinder(stop), [], 0
        while place < len(texts):
            size = rng.randrange(1, 4)
            shown += finder.feed(texts[place : place + size])
            assert wanted.startswith("".join(shown))
            place += size
        shown += finder.flush()
        assert "".join(shown) == wanted
        assert finder.found == any(each in whole for each in stop)
        if finder.found:  # the last token is the one with which the stop string was complete
            assert any(each in "".join(texts[: len(shown)]) for each in stop)
            stopped += 1
        else:
            assert len(shown) == len(texts)
    assert stopped > 5000


@pytest.mark.parametrize(
    ("stop", "message"), [("", "empty string"), (["a", ""], "empty"), ([5], "stop_tokens"), (5, "5")]
)
def test_a_stop_that_is_none_is_refused(stop, message):
    """Catches an empty string, which is in every text, and ids taken for strings."""
    for function in (text.generate_text, text.stream_text, text.trace_text):
        with pytest.raises(ValueError, match=message):
            function(*_given(), [_padded("a")], **OPTIONS, stop=stop)
