"""Real checkpoints: the shipped pair, and a Llama of the shared test data, against transformers within 1e-4."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from specjax import models
from specjax.decode.prefill import CHUNK, prefill

TOLERANCE = 1e-4
TEXT = """\
def area(width, height):
    \"\"\"Returns the area of a rectangle, or 0 where a side is negative.\"\"\"
    if width < 0 or height < 0:
        return 0
    return width * height


Once upon a time there was a little girl named Lily. She loved to play outside with her red ball.
"""


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("target", (90, 51)),
        ("draft", (CHUNK + 60, CHUNK - 1)),  # the prompt takes two chunks, for one of the rows
        ("tinystories-656k", (300, 7)),
    ],
)
def test_matches_transformers(name, lengths, shared_data, our_logits, read_reference, reference_logits):
    """Catches whatever a tiny random model hides: real scales and lengths, several cache prefixes, a prompt of several
    chunks, and a checkpoint written by another version of transformers."""
    folder = models.PRETRAINED / name if name in ("target", "draft") else shared_data(f"models/{name}")
    loaded = models.load(folder, dtype=jnp.float32)
    tokens = _texts(folder, loaded.model.vocab_size, max(lengths))
    reference = read_reference(folder)
    wanted = [reference_logits(reference, row[:length]) for row, length in zip(tokens, lengths, strict=True)]

    whole = our_logits(loaded, tokens)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(whole[row, :length], wanted[row], rtol=0, atol=TOLERANCE)

    starts = np.array(lengths) - 4  # the last tokens are read as a block after the prompt
    block = np.stack([tokens[row, start : start + 4] for row, start in enumerate(starts)])
    ends, after = (np.asarray(part) for part in _in_two(loaded.model, loaded.params, tokens, starts, block))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(ends[row], wanted[row][start - 1], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(after[row], wanted[row][start:], rtol=0, atol=TOLERANCE)


def test_bfloat16_checkpoint_stays_bfloat16(our_logits):
    """Catches parameters widened while loading, a cache wider than the parameters, and logits narrower than float32."""
    loaded = models.load(models.PRETRAINED / "draft")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.model.init_cache(loaded.params, 1, 8).keys[0].dtype == jnp.bfloat16
    tokens = _texts(loaded.path, loaded.model.vocab_size, 60)[:1]
    narrow = our_logits(loaded, tokens)[0]
    wide = models.load(models.PRETRAINED / "draft", dtype=jnp.float32)
    exact = our_logits(wide, tokens)[0]
    assert narrow.dtype == np.float32
    # 60 positions of real text: rounding moves a few close calls, never most of them.
    assert np.mean(narrow.argmax(-1) == exact.argmax(-1)) > 0.8


def test_the_pair_shares_its_vocabulary():
    """Catches a pair that `generate` would refuse, or that would speak past its tokenizer."""
    target, draft = (models.load(models.PRETRAINED / name) for name in ("target", "draft"))
    tokenizer = Tokenizer.from_file(str(models.PRETRAINED / "target" / "tokenizer.json"))
    assert target.model.vocab_size == draft.model.vocab_size == tokenizer.get_vocab_size()


def _texts(folder, vocab_size: int, width: int) -> np.ndarray:
    """[2, width] int32: a row of real text over and over, and a row of random ids."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    noise = np.random.default_rng(4).integers(0, vocab_size, width)
    return np.stack([np.resize(ids, width), noise]).astype(np.int32)


@jax.jit(static_argnums=0)
def _in_two(model, params, tokens, starts, block):
    """The logits at the prompts' ends, and those of the block after them."""
    batch, width = tokens.shape
    read = prefill(model, params, tokens, starts, model.init_cache(params, batch, width + CHUNK))
    out = model.apply(params, block, read.cache, model.init_block(params, *block.shape))
    return read.logits, out.logits
