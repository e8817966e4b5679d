"""Prompts for measurements: the openings of real Python files, cut from a corpus that the shipped pair never saw."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

CORPUS = Path(__file__).resolve().parents[2] / "shared/data/corpora/code/thealgorithms_python.txt"


class Prompts(NamedTuple):
    """Right-padded prompts."""

    tokens: np.ndarray  # [count, P] int32
    lengths: np.ndarray  # [count] int32


def code_prompts(tokenizer: Tokenizer, count: int, *, shortest: int = 24, longest: int = 64) -> Prompts:
    """`count` file openings of `shortest` to `longest` tokens, spread over the corpus; the same on every call."""
    if not CORPUS.is_file():
        raise FileNotFoundError(f"{CORPUS} is not here: measurements on real prompts need the shared corpora.")
    files = [text.split("\n", 1)[1] for text in CORPUS.read_text(encoding="utf-8").split("# file: ")[1:]]
    files = [text for text in files if len(text) > 6 * longest]
    chosen = [files[index * len(files) // count] for index in range(count)]
    lengths = np.array([shortest + (7 * row) % (longest - shortest + 1) for row in range(count)], np.int32)
    tokens = np.zeros((count, longest), np.int32)
    for row, (text, length) in enumerate(zip(chosen, lengths, strict=True)):
        tokens[row, :length] = tokenizer.encode(text).ids[:length]
    return Prompts(tokens, lengths)
