"""A store of texts: built on the host, looked up on the device, kept in a folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax
import numpy as np
from jax.typing import ArrayLike

from specjax import integers
from specjax.drafters.matches import END
from specjax.drafters.sorted_texts import SortedTexts, sort_texts

_MOST_TOKENS, _MOST_DEPTH = 2**28, 64


@functools.partial(jax.tree_util.register_dataclass, data_fields=["texts"], meta_fields=["tokenizer"])
@dataclasses.dataclass(frozen=True)
class Store:
    """Texts to draft from, the drafter_params of `suffix_store`. Immutable; its memory is fixed: 8 bytes a token."""

    texts: SortedTexts
    tokenizer: str = ""  # names the tokenizer of its texts; kept with the store, not checked

    @classmethod
    def build(
        cls, texts: Iterable[ArrayLike], *, size: int | None = None, depth: int = 8, tokenizer: str = ""
    ) -> Store:
        """Sorts texts of token ids, oldest first. That takes seconds for a million tokens, on the host.

        Args:
          texts: ids of each text.
          size: tokens that the store can hold, an END after each text included. Of more texts the oldest tokens are
            dropped. Stores of one size share compiled programs. Default: what the texts need, without room for others.
          depth: tokens of context that are compared at most.
          tokenizer: names the tokenizer that made the ids, for whoever loads the store; nothing checks it.

        Raises:
          ValueError: no text of two tokens or more; ids below 0; a size or depth out of range.
        """
        given = _checked(texts)
        if not isinstance(tokenizer, str):
            raise ValueError(f"tokenizer must be a string that names it, got a {type(tokenizer).__name__}.")
        depth = integers.static(depth, "depth", most=_MOST_DEPTH)
        if not any(len(text) > 1 for text in given):
            raise ValueError(
                "a store needs a text of two tokens or more: what follows is drafted from what came before it. The "
                f"{len(given)} texts given have none."
            )
        needed = sum(len(text) + 1 for text in given)
        size = integers.static(needed if size is None else size, "size", least=2, most=_MOST_TOKENS)
        return cls(sort_texts(given, size, depth), tokenizer)

    def add(self, texts: Iterable[ArrayLike]) -> Store:
        """A store of the same size with newer texts; where they do not fit, the oldest tokens are dropped."""
        return Store.build(
            [*map(np.asarray, self.unpack()), *texts],
            size=self.texts.size,
            depth=self.texts.depth,
            tokenizer=self.tokenizer,
        )

    def unpack(self) -> list[list[int]]:
        """The texts, oldest first."""
        tokens = np.asarray(self.texts.tokens)
        parts = np.split(tokens, np.flatnonzero(tokens == END) + 1)
        return [part[part != END].tolist() for part in parts if (part != END).any()]

    def __len__(self) -> int:
        """Tokens held."""
        return int((np.asarray(self.texts.tokens) != END).sum())


def _checked(texts: Iterable[ArrayLike]) -> list[np.ndarray]:
    """The texts as arrays, or a ValueError for the first that is no list of token ids."""
    if isinstance(texts, str):
        raise ValueError("texts is a string: pass lists of token ids, [tokenizer.encode(text).ids for text in ...].")
    given = []
    for place, text in enumerate(texts):
        ids = np.asarray(text)
        if ids.ndim == 0 and np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"texts[{place}] is one id, {ids}: texts are lists of ids, so one text is [ids].")
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(
                f"texts[{place}] must be a list of token ids, got a {type(text).__name__}: encode text first, "
                "tokenizer.encode(text).ids."
            )
        if ids.size and (ids.min() < 0 or ids.max() >= 2**31 - 1):
            raise ValueError(f"texts[{place}] holds ids outside 0..2**31 - 2: {ids.min()} to {ids.max()}.")
        given.append(ids)
    return given
