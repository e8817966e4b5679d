"""Chunks of ids to pieces of text, one for each token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from specjax.decode.stream import Chunk, Origin, warn_of_troubles
from specjax.detokenize.pieces import Codec, Detokenizer, codec
from specjax.detokenize.stop_strings import StopFinder, stop_strings
from specjax.types import Status

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Piece(NamedTuple):
    """Text that one token completed."""

    row: int
    text: str  # may be empty: of a special token, or of one that begins a character that a later token completes
    origin: Origin
    token: int  # its id


class Printer:
    """Turns the chunks of `specjax.stream` into pieces of text, one for each token.

    A piece is held back while later tokens can change its text, or make it the beginning of a stop string. A row that
    reached a stop string gives no more pieces.

    Args:
      tokenizer: from `load_tokenizer`.
      prompts: the ids of each prompt of the stream, without padding; `encode(...).ids()`.
      stop, skip_special_tokens: as for `generate_text`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        *,
        stop: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
    ):
        shared, strings = codec(tokenizer, skip_special_tokens=skip_special_tokens), stop_strings(stop)
        self._rows = [_Row(number, shared, prompt, strings) for number, prompt in enumerate(prompts)]

    @property
    def stopped(self) -> list[bool]:
        """Which rows reached a stop string."""
        return [row.has_stopped for row in self._rows]

    def pieces(self, chunk: Chunk) -> list[Piece]:
        """The pieces that are final with this chunk, row by row; all remaining ones of rows that have ended."""
        rows = zip(self._rows, chunk.tokens, chunk.origins, chunk.status.tolist(), strict=True)
        return [piece for row, tokens, origins, status in rows for piece in row.add(tokens, origins, status)]

    def rest(self) -> list[Piece]:
        """The pieces that are still held back, for a stream that is left before its end."""
        return [piece for row in self._rows for piece in row.rest()]

    def follow(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[Piece]]]:
        """Each chunk with its pieces, until every row has ended or reached a stop string."""
        for chunk in chunks:
            yield chunk, self.pieces(chunk)
            status = self.status(chunk)
            if any(self.stopped) and (status != Status.ACTIVE).all():
                warn_of_troubles(status)
                return

    def status(self, chunk: Chunk) -> np.ndarray:
        """[B] int32: the chunk's, and STOPPED for rows that reached a stop string."""
        return np.where(self.stopped, Status.STOPPED, chunk.status).astype(np.int32)


class _Row:
    """The tokens of one row whose pieces are held back until their text is final."""

    def __init__(self, number: int, codec: Codec, prompt: Sequence[int], stop: Sequence[str]):
        self._number = number
        self._detokenizer, self._finder = Detokenizer(codec, prompt), StopFinder(stop)
        self._waiting: deque[tuple[Origin, int]] = deque()

    @property
    def has_stopped(self) -> bool:
        return self._finder.found

    def add(self, tokens: Sequence[int], origins: Sequence[Origin], status: int) -> Iterator[Piece]:
        for token, origin in zip(tokens, origins, strict=True):
            if self.has_stopped:
                return
            self._waiting.append((origin, token))
            yield from self._release(self._finder.feed(self._detokenizer.feed(token)))
        if status != Status.ACTIVE:
            yield from self.rest()

    def rest(self) -> Iterator[Piece]:
        yield from self._release(self._finder.feed(self._detokenizer.flush()))
        yield from self._release(self._finder.flush())

    def _release(self, texts: Sequence[str]) -> Iterator[Piece]:
        for text in texts:
            origin, token = self._waiting.popleft()
            yield Piece(self._number, text, origin, token)
