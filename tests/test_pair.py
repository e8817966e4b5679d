"""The shipped pair on real prompts: speculation against plain decoding and against transformers, token for token."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import prompts as real_prompts
import pytest

import specjax
from specjax import models, text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not real_prompts.CORPUS.is_file(), reason="needs ../shared/data/corpora/code"),
]

NUM_PROMPTS, NEW_TOKENS = 40, 128
CAPACITY = 64 + NEW_TOKENS


@functools.cache
def _pair():
    return [models.load(models.PRETRAINED / name, dtype=jnp.float32) for name in ("target", "draft")]


@functools.cache
def _prompts() -> text.Prompts:
    tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    return text.Prompts(*real_prompts.code_prompts(tokenizer, NUM_PROMPTS))


@functools.cache
def _plain() -> list[list[int]]:
    target, _ = _pair()
    out = []
    for start in range(0, NUM_PROMPTS, 8):
        batch = [part[start : start + 8] for part in _prompts()]
        out += specjax.autoregressive(target.model, target.params, *batch, max_new_tokens=NEW_TOKENS).new_tokens()
    return out


@pytest.mark.parametrize("draft_len", range(1, 9))
def test_ragged_batches_equal_plain_decoding(draft_len):
    """40 prompts in ragged batches of 8, float32, greedy: identical, token for token."""
    assert _speculate(draft_len, 8) == _plain()


@pytest.mark.parametrize("draft_len", range(1, 9))
def test_single_rows_equal_plain_decoding(draft_len):
    """The same prompts one at a time: identical as well, so batching changes nothing either."""
    assert _speculate(draft_len, 1) == _plain()


def test_plain_decoding_equals_transformers():
    """The baseline itself, against another implementation on the same weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer = transformers.AutoModelForCausalLM.from_pretrained(models.PRETRAINED / "target", dtype=torch.float32).eval()
    for tokens, length, wanted in zip(*_prompts(), _plain(), strict=True):
        ids = torch.tensor(tokens[None, :length].astype(np.int64))
        with torch.no_grad():
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert out[0, length:].tolist() == wanted


def _speculate(draft_len: int, size: int) -> list[list[int]]:
    target, draft = _pair()
    out = []
    for start in range(0, NUM_PROMPTS, size):
        batch = [part[start : start + size] for part in _prompts()]
        generation = specjax.generate(
            target.model, target.params, specjax.drafters.draft_model(draft.model), draft.params, *batch,
            max_new_tokens=NEW_TOKENS, controller=specjax.controllers.fixed(draft_len),
        )  # fmt: skip
        out += generation.new_tokens()
    return out
