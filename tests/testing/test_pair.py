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

NUM_PROMPTS, NEW_TOKENS = 40, 64
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
    return _plain_with()


def _plain_with(**options) -> list[list[int]]:
    target, _ = _pair()
    out = []
    for start in range(0, NUM_PROMPTS, 8):
        batch = [part[start : start + 8] for part in _prompts()]
        generation = specjax.autoregressive(
            target.model, target.params, *batch, max_new_tokens=NEW_TOKENS, seeds=np.arange(start, start + 8), **options
        )
        out += generation.new_tokens()
    return out


@pytest.mark.parametrize("draft_len", range(1, 9))
def test_ragged_batches_equal_plain_decoding(draft_len):
    """40 prompts in ragged batches of 8, float32, greedy: identical, token for token."""
    assert _speculate(draft_len, 8) == _plain()


@pytest.mark.parametrize("draft_len", [1, 4, 8])
def test_single_rows_equal_plain_decoding(draft_len):
    """The same prompts one at a time: identical as well, so batching changes nothing either."""
    assert _speculate(draft_len, 1) == _plain()


def test_coupled_sampling_equals_plain_sampling():
    """40 prompts at temperature 0.8, in ragged batches of 8: the same tokens as plain decoding with the same seeds."""
    options = {"sampling": specjax.Sampling(0.8)}
    sampled = _plain_with(**options)
    assert sampled != _plain()
    assert _speculate(5, 8, verifier=specjax.verify.coupled(), **options) == sampled


def test_block_verification_keeps_at_least_as_many_tokens():
    """40 prompts at temperature 1, K = 8: tokens a round by block verification against token-level rejection."""
    per_round = {}
    for rule in (specjax.verify.rejection(), specjax.verify.block()):
        kept: list = []
        _speculate(8, 8, verifier=rule, sampling=specjax.Sampling(1.0), stats=kept)
        per_round[rule] = sum(int(x.emitted.sum()) for x in kept) / sum(int(x.rounds.sum()) for x in kept)
    token_level, block = per_round.values()
    assert block >= token_level


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


def _speculate(draft_len: int, size: int, stats: list | None = None, **options) -> list[list[int]]:
    target, draft = _pair()
    out = []
    for start in range(0, NUM_PROMPTS, size):
        batch = [part[start : start + size] for part in _prompts()]
        generation = specjax.generate(
            target.model, target.params, specjax.drafters.draft_model(draft.model), draft.params, *batch,
            max_new_tokens=NEW_TOKENS, controller=specjax.controllers.fixed(draft_len),
            seeds=np.arange(start, start + size), **options,
        )  # fmt: skip
        out += generation.new_tokens()
        if stats is not None:
            stats.append(generation.stats)
    return out
