"""Tokenizers that spell characters in several tokens, texts that make them do so, and chunks made by hand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as kinds

from specjax import models, stats, text
from specjax.decode.stream import Chunk, Drafted, LogProb, Origin
from specjax.models import llama2c
from specjax.types import Status

STORIES = Path(__file__).resolve().parents[3] / "shared/data/models/stories260k/tok512.bin"
FIRST_BYTE, END = 3, 2
SCRIPTS = [
    "Hello a b", "é ñ ß", "🙂🎉", "👩\u200d🔬👨\u200d👩\u200d👧", "🏳️\u200d🌈", "🇩🇪🇫🇷",
    "日本語", "한국어", "हिन्दी", "العربية", "Ελλάδα", "ไทย",
    "\n\n\t  x", "\ufffd", "\U0001d518\U0001d52b", "e\u0301",
]  # fmt: skip


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it: printable ASCII in the vocabulary, everything else in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *map(chr, range(33, 127)), "he", "EN", "END", "\ufffd"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    merges = [("h", "e"), ("E", "N"), ("EN", "D")]
    tokenizer = Tokenizer(kinds.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2 has it."""
    return text.load_tokenizer(models.PRETRAINED / "target")


def llama2c_bytes() -> Tokenizer:
    """Of llama2.c; a small vocabulary, so that much is spelt in bytes."""
    return llama2c.load_tokenizer(STORIES, 512)


def in_bytes(content: str | bytes) -> list[int]:
    """Ids of `byte_fallback`."""
    return [FIRST_BYTE + byte for byte in (content.encode() if isinstance(content, str) else content)]


def strange_tokens(tokenizer: Tokenizer) -> list[int]:
    """Those that are parts of characters."""
    return [token for token in range(tokenizer.get_vocab_size()) if "\ufffd" in tokenizer.decode([token])]


def random_ids(tokenizer: Tokenizer, parts: list[int], rng: random.Random) -> list[int]:
    """Of a text in many scripts; some are cut, some have strange tokens in between, some are nothing but those."""
    size = tokenizer.get_vocab_size()

    def strange() -> int:
        return rng.choice(parts) if rng.random() < 0.8 else rng.randrange(size)

    content = "".join(rng.choice(SCRIPTS)[rng.randrange(3) :] for _ in range(rng.randrange(1, 5)))
    ids, kind = tokenizer.encode(content).ids, rng.random()
    if kind < 0.3:
        return ids[: rng.randrange(len(ids) + 1)]
    if kind < 0.6:
        for _ in range(rng.randrange(1, 5)):
            ids.insert(rng.randrange(len(ids) + 1), strange())
    return [strange() for _ in range(rng.randrange(30))] if kind > 0.85 else ids


def chunks_of(new: list[int], rng: random.Random, end: Status = Status.LENGTH) -> list[Chunk]:
    """One row's tokens as a stream might yield them: rounds of accepted tokens and one of the target's."""
    found, place = [], 0
    score = LogProb(-1.0, -0.5)
    while place < len(new) or not found:
        tokens = new[place : place + (rng.randrange(1, 6) if place else 1)]
        place += len(tokens)
        kept = tokens[:-1]
        drafted = Drafted(kept, [0.5] * len(kept), [score] * len(kept), list(range(len(kept))), len(tokens))
        origins = [Origin.ACCEPTED] * len(kept) + [Origin.BONUS] * (len(tokens) > len(kept))
        status = np.array([end if place >= len(new) else Status.ACTIVE], np.int32)
        rounds = [drafted] if tokens else []
        found.append(Chunk([tokens], [origins], [[score] * len(tokens)], [rounds], status, stats.zeros(1, 5)))
    return found
