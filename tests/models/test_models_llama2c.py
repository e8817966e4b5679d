"""llama2.c files: stories260K against run.c's arithmetic and merges, rewritten here, and the text that it printed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import models, sharding
from specjax.models import llama2c

TOLERANCE = 1e-4
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces, and a line\nbreak\ttab",
    "quizzical hyphens -- and 12345 digits!?",
    "ünïcödé: 猫 is a cat, 🙂 is a smile",
    "x",
)


class Pieces(NamedTuple):
    """A tokenizer.bin."""

    pieces: list[bytes]
    scores: list[float]


@pytest.fixture(scope="module")
def folder(shared_data) -> Path:
    return shared_data("models/stories260k")


@pytest.fixture(scope="module")
def loaded(folder) -> models.Loaded:
    return models.load(folder / "stories260K.bin")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return llama2c.load_tokenizer(folder / "tok512.bin", 512)


def test_greedy_text_is_the_one_its_author_printed(loaded, tokenizer, folder, quickly):
    """Catches weights in the wrong order, rotary pairs in the wrong layout, wrong rope or norms, a wrong BOS, and a
    decoder that misplaces spaces: any of them changes the story."""

    @quickly
    def generate(params):
        return specjax.autoregressive(loaded.model, params, jnp.array([[1]]), max_new_tokens=240)

    told = tokenizer.decode(generate(loaded.params).new_tokens()[0])
    printed = (folder / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    assert len(told) > 500
    assert printed.startswith(told[:500])


def test_logits_match_the_arithmetic_of_run_c(loaded, folder, our_logits):
    """Catches errors that a transformers model built by the same permutation would share: here the pairs are rotated
    side by side, with the angles stored in the file, in float64."""
    tokens = np.random.default_rng(0).integers(0, 512, 40, np.int32)
    wanted = _run_c(folder / "stories260K.bin", tokens)
    np.testing.assert_allclose(our_logits(loaded, tokens[None])[0], wanted, rtol=0, atol=TOLERANCE)


def test_transformers_reads_what_save_makes_of_it(loaded, tmp_path, our_logits, read_reference, reference_logits):
    """Catches a config that describes these weights to specjax only."""
    models.save(loaded, tmp_path / "saved")
    tokens = np.arange(40)
    ours = our_logits(loaded, tokens[None])[0]
    theirs = reference_logits(read_reference(tmp_path / "saved"), tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_encodes_as_run_c_does(tokenizer, folder, text):
    """Catches merges in the wrong order, spaces that are no pieces, and characters without a piece that do not fall
    back to bytes."""
    pieces = _read_pieces(folder / "tok512.bin")
    assert tokenizer.encode(text).ids == _encode_c(pieces, text)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(tokenizer, text):
    """Catches a decoder that loses the first space, a byte or a line break."""
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_merges_by_score_and_not_by_id(tmp_path):
    """Catches merges ranked by id: in the story model's file, as in most, the two orders are one."""
    pieces = {"<unk>": 0, "\n<s>\n": 0, "\n</s>\n": 0, " ": 0, "a": 0, "b": 0, "c": 0, "ab": -2, "bc": -1}
    entries = [struct.pack("<fi", score, len(piece)) + piece.encode() for piece, score in pieces.items()]
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 6) + b"".join(entries))
    made = llama2c.load_tokenizer(tmp_path / "tokenizer.bin", len(pieces))
    text = "abab bcabc"
    assert made.encode(text).ids == _encode_c(_read_pieces(tmp_path / "tokenizer.bin"), text)
    assert made.encode("abc").ids == [1, 3, 4, 8]  # a, bc
    assert made.decode(made.encode(text).ids) == text


def test_dtype_and_layout_reach_every_tensor(folder):
    """Catches options that this format passes over."""
    layout = sharding.layout(sharding.make_mesh(model=2))
    loaded = models.load(folder / "stories260K.bin", dtype=jnp.bfloat16, layout=layout)
    leaves = jax.tree.leaves(loaded.params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert all(len(leaf.sharding.device_set) == 2 for leaf in leaves)
    down = loaded.params["model"]["layers"][4]["mlp"]["down_proj"]["weight"][...]
    assert down.addressable_shards[0].data.shape == (64, 86)


def test_an_output_layer_of_its_own(tmp_path):
    """Catches a negative vocabulary size read as a broken header, and an output layer read from the wrong place."""
    width, inner, layers, heads, kv_heads, vocab, positions = 8, 12, 1, 2, 1, 11, 4
    shared = vocab * width + layers * (2 * width + 2 * width * width + 2 * width * 4 + 3 * width * inner) + width
    angles = positions * (width // heads)
    values = np.random.default_rng(0).normal(size=shared + angles + vocab * width).astype("<f4")
    path = tmp_path / "untied.bin"
    path.write_bytes(struct.pack("<7i", width, inner, layers, heads, kv_heads, -vocab, positions) + values.tobytes())
    loaded = models.load(path)
    assert loaded.model.vocab_size == vocab
    assert loaded.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(loaded.params["lm_head"]["weight"][...].ravel(), values[shared + angles :])
    np.testing.assert_array_equal(loaded.params["model"]["norm"]["weight"][...], values[shared - width : shared])


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (b"", "0 bytes"),
        (b"not a checkpoint of any kind at all", "version 0"),
        (struct.pack("<7i", 64, 172, 5, 0, 4, 512, 512), "header reads"),
        (struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512) + bytes(1000), "1028 bytes"),
    ],
)
def test_damaged_file_is_named(tmp_path, content, culprit):
    """Catches a short or foreign file read as weights."""
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged.bin.*{culprit}"):
        models.load(path)


def test_damaged_tokenizer_is_named(folder, tmp_path):
    """Catches a tokenizer of another model, or one cut short, read as far as it goes."""
    path = tmp_path / "short.bin"
    path.write_bytes((folder / "tok512.bin").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"short.bin ends after \d+ of 512 tokens"):
        llama2c.load_tokenizer(path, 512)


def _run_c(path: Path, tokens: np.ndarray) -> np.ndarray:
    """llama2.c's forward pass (run.c, version 0 files, tied) in float64: [T] -> [T, V]."""
    data = path.read_bytes()
    width, inner, layers, heads, kv_heads, vocab, positions = struct.unpack("<7i", data[:28])
    values, offset = np.frombuffer(data, "<f4", offset=28).astype(np.float64), 0
    size, length = width // heads, len(tokens)

    def take(*shape):
        nonlocal offset
        offset += int(np.prod(shape))
        return values[offset - int(np.prod(shape)) : offset].reshape(shape)

    embedding, attention_norm = take(vocab, width), take(layers, width)
    wq, wk, wv = (take(layers, count * size, width) for count in (heads, kv_heads, kv_heads))
    wo, ffn_norm = take(layers, width, width), take(layers, width)
    w1, w2, w3 = take(layers, inner, width), take(layers, width, inner), take(layers, inner, width)
    final_norm, cos, sin = take(width), take(positions, size // 2), take(positions, size // 2)

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * weight

    def rotate(x):  # [T, H, size]
        real, imaginary = x[..., 0::2], x[..., 1::2]
        c, s = cos[:length, None], sin[:length, None]
        return np.stack([real * c - imaginary * s, real * s + imaginary * c], -1).reshape(x.shape)

    x = embedding[tokens]
    for layer in range(layers):
        h = norm(x, attention_norm[layer])
        query = rotate((h @ wq[layer].T).reshape(length, heads, size))
        key = rotate((h @ wk[layer].T).reshape(length, kv_heads, size)).repeat(heads // kv_heads, 1)
        value = (h @ wv[layer].T).reshape(length, kv_heads, size).repeat(heads // kv_heads, 1)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, value).reshape(length, width) @ wo[layer].T
        h = norm(x, ffn_norm[layer])
        gate = h @ w1[layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w3[layer].T)) @ w2[layer].T
    return norm(x, final_norm) @ embedding.T


def _read_pieces(path: Path) -> Pieces:
    data, offset, pieces, scores = path.read_bytes(), 4, [], []
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length])
        scores.append(score)
        offset += 8 + length
    return Pieces(pieces, scores)


def _encode_c(tokenizer: Pieces, text: str) -> list[int]:
    """run.c's encode: BOS, a space, characters (or bytes), then always the best-scored merge of two neighbours."""
    pieces, scores = tokenizer
    ids = {piece: index for index, piece in reversed(list(enumerate(pieces)))}
    tokens = [ids[b" "]]
    for character in text:
        code = character.encode()
        tokens += [ids[code]] if code in ids else [byte + 3 for byte in code]
    while True:
        merged = [ids.get(pieces[a] + pieces[b]) for a, b in zip(tokens, tokens[1:], strict=False)]
        ranked = [(-scores[token], place) for place, token in enumerate(merged) if token is not None]
        if not ranked:
            return [1, *tokens]
        place = min(ranked)[1]
        tokens[place : place + 2] = [merged[place]]
