"""From files to what generation is given: tokenizers, positions, prompt files, folders that hold something else."""

from __future__ import annotations

import jax
import pytest
import tiny
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokens

import specjax
from specjax import models, pair, text

WORDS = 13  # of the tokenizer; the models have more columns


def _tokenizer(size: int = WORDS) -> Tokenizer:
    made = Tokenizer(tokens.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def _long(count: int) -> str:
    return " ".join(f"w{index % WORDS}" for index in range(count))


@pytest.mark.parametrize("direction", ["left", "right"])
def test_a_tokenizer_file_neither_cuts_nor_pads_prompts(tmp_path, direction):
    """Catches a prompt of 23 ids read as 8, or as 48 with pads, because the file was written for training."""
    for name, change in (
        ("truncation", lambda made: made.enable_truncation(8, direction=direction)),
        ("padding", lambda made: made.enable_padding(length=48, direction=direction)),
    ):
        made = _tokenizer()
        change(made)
        made.save(str(tmp_path / f"{name}.json"))
        read = text.load_tokenizer(tmp_path / f"{name}.json")
        assert text.encode(read, [_long(23)]).ids() == [[index % WORDS for index in range(23)]], name


def test_a_tokenizer_in_hand_neither_cuts_nor_pads_prompts():
    """The same for one that was read without `load_tokenizer`: pads are left out, and a cut is an error."""
    made = _tokenizer()
    made.enable_padding(length=48, direction="left")
    assert text.encode(made, ["w1 w2 w3", "w4"]).ids() == [[1, 2, 3], [4]]
    made.enable_truncation(8)
    with pytest.raises(ValueError, match=r"cuts prompt 1 to 8 tokens.*no_truncation"):
        text.encode(made, ["w1", _long(23)])


def test_a_broken_tokenizer_file_is_named(tmp_path):
    """Catches a traceback of the tokenizer library, whose errors have no type of their own."""
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer that can be read.*fetch the file again"):
        text.load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A target of 40 columns, a draft of 36 and a tokenizer of 13 words: three folders, as --tokenizer is given."""
    folder = tmp_path_factory.mktemp("padded")
    for seed, (name, size) in enumerate({"target": 40, "draft": 36}.items()):
        models.save(
            models.random(tiny.config("llama", size, num_hidden_layers=2 - seed), jax.random.key(seed)), folder / name
        )
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_ids_past_the_tokenizer_are_never_emitted(padded):
    """Catches padding columns drawn (11 of 200 tokens at temperature 3) where the tokenizer is not in the target's
    folder, and a pair refused because the two are padded differently."""
    found = pair.load_pair(str(padded / "target"), str(padded / "draft"), str(padded / "tokenizer.json"), None)
    assert found.target.model.vocab_size == found.draft.model.vocab_size == WORDS
    target, draft = found.target, found.draft
    options = {"max_new_tokens": 60, "sampling": specjax.Sampling(3.0)}
    prompts = text.encode(found.tokenizer, ["w1 w2", "w3"])
    drafter = specjax.drafters.draft_model(draft.model)
    out = specjax.generate(target.model, target.params, drafter, draft.params, *prompts, **options)
    assert max(max(row) for row in out.new_tokens()) < WORDS


@pytest.mark.parametrize("call", ["generate_text", "stream_text", "trace_text"])
def test_texts_end_the_vocabulary_with_the_tokenizer(padded, call):
    """The same in Python, where tokenizer and models were loaded apart."""
    target, draft = (models.load(padded / name) for name in ("target", "draft"))
    assert (target.model.vocab_size, draft.model.vocab_size) == (40, 36)
    drafter = specjax.drafters.draft_model(draft.model)
    tokenizer = text.load_tokenizer(padded)
    options = {"max_new_tokens": 60, "sampling": specjax.Sampling(3.0)}
    out = getattr(text, call)(target.model, target.params, drafter, draft.params, tokenizer, ["w1 w2", "w3"], **options)
    if call == "generate_text":
        counts = [len(row.split()) for row in out]
    elif call == "stream_text":
        pieces = list(out)
        counts = [sum(piece.text.strip() != "" for piece in pieces if piece.row == row) for row in (0, 1)]
    else:
        counts = [
            sum(token.text.strip() != "" for turn in row.rounds for token in turn.emitted()) + 1 for row in out.rows
        ]
    assert counts == [60, 60]  # each id is a word; one past the tokenizer has no text


def test_gaps_and_added_tokens_count():
    """Catches a vocabulary that is counted instead of measured, and one cut off before its added tokens."""
    gaps = Tokenizer(tokens.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    assert text.vocab_size(gaps) == 8
    added = _tokenizer()
    added.add_special_tokens(["<end>"])
    assert text.vocab_size(added) == WORDS + 1
    model = models.random(tiny.config("llama", 40), jax.random.key(0)).model
    assert text.within_vocab(model, _tokenizer(50)).vocab_size == 40
    assert text.within_vocab(model, gaps).vocab_size == 8
