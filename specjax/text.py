"""Strings in, strings out: tokenizers, padded prompts, and text as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from specjax import trace
from specjax.decode import generate
from specjax.stream import Chunk, Origin, stream, warn_of_troubles
from specjax.trace import Trace
from specjax.types import Drafter, Model, PyTree

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUCKET = 32


class Prompts(NamedTuple):
    """Right-padded prompts, as `generate` takes them."""

    tokens: np.ndarray  # [B, P] int32
    lengths: np.ndarray  # [B] int32

    def ids(self) -> list[list[int]]:
        """Those of each prompt, without padding."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


class Piece(NamedTuple):
    """Text that one token completed."""

    row: int
    text: str  # may be empty: the token began a character that a later one completes
    origin: Origin


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (its tokenizer.json).

    Raises:
      FileNotFoundError: no tokenizer.json there.
      ImportError: the extra `hf` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text needs the tokenizers package: pip install 'specjax[hf]'.") from error
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path} does not exist: give a folder with a tokenizer.json, or that file.")
        raise FileNotFoundError(
            f"{file} does not exist. Folders without a tokenizer.json can be converted with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    return Tokenizer.from_file(str(file))


def pad_prompts(prompts: Sequence[Sequence[int]], *, bucket: int = BUCKET) -> Prompts:
    """Pads ragged ids on the right, to a multiple of `bucket` so that prompts of similar length share one program.

    >>> pad_prompts([[5, 6, 7], [8]], bucket=4).tokens.tolist()
    [[5, 6, 7, 0], [8, 0, 0, 0]]
    """
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError("every prompt needs at least one token: start empty ones with the tokenizer's BOS token.")
    width = -(-int(lengths.max()) // bucket) * bucket
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    return Prompts(tokens, lengths)


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, bucket: int = BUCKET) -> Prompts:
    """Token ids of `texts`, a list of strings, padded."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string: for a single prompt pass [text].")
    for row, text in enumerate(texts):
        if not tokenizer.encode(text).ids:
            raise ValueError(f"prompt {row} is empty: give at least one character.")
    return pad_prompts([tokenizer.encode(text).ids for text in texts], bucket=bucket)


def generate_text(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    **options: Any,
) -> list[str]:
    """The continuation of each text, without the text itself. Options as for `specjax.generate`.

    >>> import specjax
    >>> from specjax import models, text
    >>> target = models.load(models.PRETRAINED / "target", dtype="float32")
    >>> draft = models.load(models.PRETRAINED / "draft", dtype="float32")
    >>> drafter = specjax.drafters.draft_model(draft.model)
    >>> tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    >>> out = text.generate_text(target.model, target.params, drafter, draft.params, tokenizer, ["import numpy as"],
    ...                          max_new_tokens=2)
    >>> out
    ['\\n\\n']
    """
    prompts = encode(tokenizer, texts)
    out = generate(model, params, drafter, drafter_params, *prompts, **options)
    warn_of_troubles(np.asarray(out.status))
    decoded = zip(prompts.tokens, prompts.lengths, out.new_tokens(), strict=True)
    return [_continuation(tokenizer, tokens[:length].tolist(), new) for tokens, length, new in decoded]


def stream_text(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    **options: Any,
) -> Iterator[Piece]:
    """Yields the text of each new token as it comes. Options as for `specjax.stream`."""
    prompts = encode(tokenizer, texts)
    printer = Printer(tokenizer, prompts)
    for chunk in stream(model, params, drafter, drafter_params, *prompts, **options):
        yield from printer.pieces(chunk)


def trace_text(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    **options: Any,
) -> Trace:
    """Generates, and keeps every round: shown in a notebook, each token says where it came from and how likely it was.

    `str` of the result is the text, `specjax.viewer.save(result, "trace.html")` makes a page of it. Options as for
    `specjax.stream`.
    """
    prompts = encode(tokenizer, texts)
    chunks = stream(model, params, drafter, drafter_params, *prompts, **options)
    return trace.collect(chunks, prompts.ids(), tokenizer.decode, name=tokenizer.id_to_token)


class Printer:
    """Turns chunks of ids into pieces of text; keeps what an incomplete character needs."""

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts):
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._streams = [DecodeStream(skip_special_tokens=True) for _ in prompts.lengths]
        for stream_, tokens, length in zip(self._streams, prompts.tokens, prompts.lengths, strict=True):
            for token in tokens[:length].tolist():  # spaces depend on what came before
                stream_.step(tokenizer, token)

    def pieces(self, chunk: Chunk) -> Iterator[Piece]:
        """The pieces of one chunk, row by row."""
        for row, (tokens, origins) in enumerate(zip(chunk.tokens, chunk.origins, strict=True)):
            for token, origin in zip(tokens, origins, strict=True):
                yield Piece(row, self._streams[row].step(self._tokenizer, token) or "", origin)


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    whole, start = tokenizer.decode(prompt + new), tokenizer.decode(prompt)
    return whole.removeprefix(start)
