"""Texts, streams and traces are what the tokenizer decodes, in whatever tokens a character is spelt; and they end where
the checkpoint or a stop string says."""

from __future__ import annotations

import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spelt

import specjax
from specjax import testing, text
from specjax.detokenize import pieces as detokenize
from specjax.viewer import trace

PART = "\ufffd"
TOKENIZERS = {"byte fallback": spelt.byte_fallback, "byte level": spelt.byte_level, "llama2.c": spelt.llama2c_bytes}
TOKENIZER = spelt.byte_fallback()
VOCAB = TOKENIZER.get_vocab_size()
MODEL = testing.table_model(1, VOCAB)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=VOCAB)
DRAFTER = specjax.drafters.draft_model(MODEL)
GIVEN = (MODEL, TABLE, DRAFTER, TABLE, TOKENIZER)
WIDTH = 40  # tokens of each prompt below


def _again(logits, tokens, length):
    """Writes the prompt once more, token by token."""
    return jnp.where(jnp.arange(VOCAB) == tokens[length - WIDTH], 0.0, -jnp.inf)


OPTIONS = {"processor": _again, "capacity": 96}


def _padded(content):
    """With as many letters before it as make a prompt of WIDTH tokens."""
    return "x" * (WIDTH - len(TOKENIZER.encode(content).ids)) + content


def _streamed(tokenizer, prompt, chunks, **options):
    printer = text.Printer(tokenizer, [prompt], **options)
    return [piece for chunk in chunks for piece in printer.pieces(chunk)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_what_the_tokenizer_decodes(kind):
    """Catches characters repeated, cut or lost between tokens, rounds and chunks, an exception where a broken character
    is followed by text, and runs of byte tokens that are shown before they are over: an invalid byte spoils all."""
    if kind == "llama2.c" and not spelt.STORIES.is_file():
        pytest.skip("needs ../shared/data/models/stories260k")
    tokenizer, rng = TOKENIZERS[kind](), random.Random(1)
    byte_tokens, parts = detokenize.codec(tokenizer).byte_tokens, spelt.strange_tokens(tokenizer)
    assert len(byte_tokens) == (0 if kind == "byte level" else 256)
    compared = 0
    for number in range(2000):
        ids = spelt.random_ids(tokenizer, parts, rng)
        place = rng.choice([0, rng.randrange(len(ids) + 1)])
        prompt, new = ids[:place] or [tokenizer.encode("a").ids[-1]], ids[place:]
        whole, start = tokenizer.decode(prompt + new), tokenizer.decode(prompt)
        changes = byte_tokens.issuperset([prompt[-1], *new[:1]]) and PART in whole
        chunks = spelt.chunks_of(new, rng)
        pieces = _streamed(tokenizer, prompt, chunks)
        assert [piece.token for piece in pieces] == new
        streamed = "".join(piece.text for piece in pieces)
        if whole.startswith(start) and not changes:
            assert streamed == whole[len(start) :], (prompt, new)
            compared += 1
        if number % 4 == 0 and not changes:
            (row,) = trace.collect(chunks, [prompt], tokenizer.decode).rows
            assert (row.prompt, row.text) == (start, streamed)
            if PART not in whole:
                assert "".join(token.text.strip(PART) for token in row.emitted()) == streamed
    assert compared > 1200


@pytest.mark.parametrize(
    ("prompt", "new", "wanted"),
    [
        ("🙂".encode(), "🙂".encode(), ["", "", "", "🙂"]),
        (b"\xf0\x9f", b"\x99\x82!", ["", "🙂", "!"]),  # the new token that completes it
        (b"\n", b"\xf0\x9f", [PART, PART]),  # spoilt, and the prompt is not given back
        ("é🙂".encode(), b"\xf0\x9f\x99", [PART, PART, PART]),
        (b"a", "é".encode() + b"\xf0", [PART, PART, PART]),  # as the tokenizer decodes it
        (b"\xf0", b"a", [PART]),  # "a" is a byte token here: of the spoilt run
    ],
)
def test_a_prompt_that_ends_in_bytes(prompt, new, wanted):
    """Catches a continuation with the prompt in it, and new text that is lost with the prompt's broken character."""
    assert detokenize.split(detokenize.codec(TOKENIZER), spelt.in_bytes(prompt), spelt.in_bytes(new)) == wanted


def test_a_token_costs_the_same_wherever_it_stands():
    """Catches a decoder that decodes the whole text, or a whole run of bytes, for each token."""
    codec = detokenize.codec(TOKENIZER)

    def seconds(ids, prompt=()):
        began = time.perf_counter()
        detokenize.split(codec, prompt, ids)
        return time.perf_counter() - began

    many = 20_000
    seconds([263] * 100)
    unit = seconds([263] * many)
    for ids in (
        spelt.in_bytes("🙂" * (many // 4)),
        spelt.in_bytes(b"\xf0" * many),
        [VOCAB - 1] * many,
        [2, 263] * many,
    ):
        assert seconds(ids) < 20 * unit  # quadratic: thousands
        assert seconds([263], prompt=ids) < 20 * unit


@pytest.mark.parametrize(
    ("tokenizer", "texts", "said"),
    [
        ("a-folder", ["a"], r"tokenizers\.Tokenizer, got str: load it by text\.load_tokenizer\(path\)"),
        (None, ["a"], "tokenizers.Tokenizer, got NoneType: load it"),
        (TOKENIZER, [b"a"], "texts must be a list of strings, got bytes at place 0: decode it"),
        (TOKENIZER, ["a", "b\udcff"], r"prompt 1 is no text: '\\udcff' at place 1 is half a character"),
        (TOKENIZER, [], "texts is empty: there must be one or more strings"),
        (TOKENIZER, 3, "texts must be a list of strings, got int"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer, texts, said):
    """Catches LookupError, AttributeError and TypeError from inside a tokenizer."""
    for call in (text.generate_text, text.stream_text, text.trace_text):
        with pytest.raises(ValueError, match=said):
            call(*GIVEN[:4], tokenizer, texts, max_new_tokens=2)


def test_texts_are_made_on_the_host():
    """Catches a TracerArrayConversionError, whether parameters are traced or closed over."""
    for make in (lambda table: text.generate_text(MODEL, table, DRAFTER, table, TOKENIZER, ["a"]), lambda table: (
        text.generate_text(*GIVEN, ["a"])
    )):  # fmt: skip
        with pytest.raises(ValueError, match=r"on the host and cannot be traced: inside jit call specjax\.generate"):
            jax.jit(make)(TABLE)
    with pytest.raises(ValueError, match="path must be a string or a path"):
        text.load_tokenizer(3)  # type: ignore[arg-type]


def test_all_functions_tell_the_same_text_of_characters_in_bytes():
    """Catches a trace of ten such characters with characters repeated and cut, a stream that dies, and a prompt that is
    given back where it ends in such a character and the output is cut inside one."""
    texts = [_padded("🙂🎉🌈🔬🐍👩🏳🔭🇩"), _padded("日本語 and 한국어")]
    cut = ["xxxx" + PART * 34, texts[1].removesuffix("한국어") + PART * 8]  # runs that are not complete
    for limits, wanted in (([40, 40], texts), ([38, 39], cut)):
        options = {**OPTIONS, "max_new_tokens": np.array(limits)}
        assert text.generate_text(*GIVEN, texts, **options) == wanted
        rows = ["", ""]
        for piece in text.stream_text(*GIVEN, texts, **options):
            rows[piece.row] += piece.text
        assert rows == wanted
        found = text.trace_text(*GIVEN, texts, **options)
        assert [row.text for row in found.rows] == wanted
        if wanted == texts:
            written = [token.text for token in found.rows[0].emitted()]
            assert written[:12] == ["x"] * 4 + [PART, PART, PART, "🙂", PART, PART, PART, "🎉"]
            assert PART not in found._repr_html_()
            assert sum(len(one.draft) for one in found.rows[0].rounds) > 20
        assert found._repr_html_().count(PART) == "".join(wanted).count(PART)
