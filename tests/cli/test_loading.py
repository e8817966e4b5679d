"""From files to what generation is given: tokenizers, positions, prompt files, folders that hold something else."""

from __future__ import annotations

import io
import os
import shutil
import struct
import sys
import threading

import huggingface_hub
import jax
import pytest
import tiny
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokens

import specjax
from specjax import models, text
from specjax.cli import load_pair, main

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
    found = load_pair.load_pair(str(padded / "target"), str(padded / "draft"), str(padded / "tokenizer.json"), None)
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


# Prompt files.


def _read(tmp_path, data: bytes) -> list[str]:
    (tmp_path / "prompts.txt").write_bytes(data)
    return main._prompts(None, tmp_path / "prompts.txt")


def test_a_prompt_file_is_read_as_its_editor_shows_it(tmp_path):
    """Catches a byte order mark that becomes part of the first prompt, and prompts cut at what is no end of a line."""
    assert _read(tmp_path, "\ufeffdef f\r\nclass A\n\n".encode()) == ["def f", "class A"]
    for mark in "\u2028\u2029\x85\f\v\x1c":
        assert _read(tmp_path, f"one{mark}two\nthree".encode()) == [f"one{mark}two", "three"], repr(mark)


def test_a_file_in_another_encoding_is_named(tmp_path):
    """Catches "'utf-8' codec can't decode byte 0xff" with no word of which file, or of what to do."""
    for coding in ("utf-16", "latin-1"):
        with pytest.raises(ValueError, match=r"prompts\.txt is no UTF-8 text.*save it as UTF-8"):
            _read(tmp_path, "é\n".encode(coding))


def test_a_pipe_is_a_prompt_file(tmp_path):
    """Catches `--prompt-file <(...)` and /dev/stdin, which can be read but are no regular files, said not to exist."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\ntwo\n",))
    writer.start()
    found = main._prompts(None, pipe)
    writer.join()
    assert found == ["one", "two"]
    with pytest.raises(ValueError, match=f"{tmp_path}: Is a directory"):
        main._prompts(None, tmp_path)


def test_standard_input_is_a_prompt(monkeypatch):
    """The same mark and the same message for `specjax generate -`."""
    for data, wanted in ((b"\xef\xbb\xbfdef f\r\n", "def f\n"), ("ü\n".encode(), "ü\n")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main._prompts("-", None) == [wanted]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ü".encode("utf-16"))))
    with pytest.raises(ValueError, match="standard input is no UTF-8 text"):
        main._prompts("-", None)


# Repositories and folders.


_ABOUT = {"config.json", "tokenizer.json", "README.md"}
_SPARE = {"consolidated.safetensors", "original/consolidated.00.safetensors", "adapters/adapter_model.safetensors",
          "model.fp16.safetensors", "onnx/model.safetensors", "pytorch_model.bin"}  # fmt: skip


@pytest.mark.parametrize("num_shards", [1, 2])
def test_the_hub_is_asked_for_one_copy_of_the_weights(monkeypatch, tmp_path, num_shards):
    """Catches consolidated.safetensors, original/ and adapters fetched beside the weights, twice the bytes or more."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    loaded = models.random(tiny.config("llama"), jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    models.save(loaded, repository, max_shard_bytes=2 * size // num_shards)
    weights = {file.name for file in repository.glob("model*.safetensors*")}
    assert len(weights) == (1 if num_shards == 1 else 1 + len(list(repository.glob("model-*"))))
    _tokenizer().save(str(repository / "tokenizer.json"))
    for name in (*_SPARE, "README.md"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"spare")

    def fetch(name, *, allow_patterns):
        names = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for found in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / found).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / found, cache / found)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert models.load("someone/tiny").config["hidden_size"] == 16
    assert {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()} == (
        weights | _ABOUT - {"README.md"}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, r"'mamba'.*known: llama.*specjax\.adapters\.from_nnx or from_linen"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5'.*encoder-decoders are not supported yet"),
        ({"model_type": "encoder-decoder", "encoder": {}, "decoder": {}}, "encoder-decoders are not supported yet"),
    ],
)
def test_an_unknown_family_says_what_can_be_done(changes, said):
    """Catches a message that sends the user of a T5 to wrap it, and one that does not name what wraps a module."""
    with pytest.raises(ValueError, match=said) as caught:
        models.build({**tiny.config("llama"), **changes})
    assert ("adapters" in str(caught.value)) == (changes["model_type"] == "mamba")


def test_what_is_no_path_model_or_dtype_is_refused():
    """Catches TypeError and AttributeError, a folder's name asked of the hub, and float64 that becomes float32."""
    draft = models.PRETRAINED / "draft"
    for call, said in (
        (lambda: models.load(3), "path_or_hub_id must be a string or a path.*got int"),
        (lambda: models.load(b"x"), "path_or_hub_id must be a string or a path.*got bytes"),
        (lambda: models.quantize(3), "loaded must be what models.load .* got int"),
        (lambda: models.save(3, "folder"), "loaded must be what models.load .* got int"),
        (lambda: models.load(draft, dtype="float64"), "cannot be float64: float32 is the widest here"),
        (lambda: models.random(tiny.config("llama"), jax.random.key(0), float), "cannot be float64"),
        (lambda: models.load(draft, dtype="float33"), "unknown dtype 'float33'"),
        (lambda: load_pair.load_pair(None, None, None, ""), "--dtype is empty: .*leave the option out"),
        (lambda: load_pair.load_target(str(draft), None, "float64"), "float32 is the widest here"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(FileNotFoundError, match="nowhere/ is neither a folder"):
        models.load("nowhere/")


def test_a_folder_with_a_llama2c_file_says_so(tmp_path):
    """Catches "a Hugging Face model folder is expected" where the model lies there, in the other format."""
    header = (8, 4, 1, 2, 2, 11, 16)
    count = 11 * 8 + 2 * 8 + 4 * 8 * 8 + 3 * 4 * 8 + 8 + 16 * 4
    (tmp_path / "tiny.bin").write_bytes(struct.pack("<7i", *header) + bytes(4 * count))
    assert models.load(tmp_path / "tiny.bin").config["vocab_size"] == 11
    (tmp_path / "a-tokenizer.bin").write_bytes(struct.pack("<ifi", 7, -1.0, 1) + b"a" * 60)
    (tmp_path / "short.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"no config\.json, but a llama2\.c file: load that, .*/tiny\.bin"):
        models.load(tmp_path)
    (tmp_path / "tiny.bin").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json: a Hugging Face model folder is expected"):
        models.load(tmp_path)
