"""Ids to text, token by token: the text that each token completes, also while more tokens arrive.

Two kinds of tokenizers spell a character in several tokens. Byte-level BPE (GPT-2) has tokens that hold parts of a
character; a broken character becomes U+FFFD and its neighbours stay as they are. Byte fallback (Llama 2, Mistral) has a
token for every byte, and a run of byte tokens decodes as a unit: if the run is not valid UTF-8 from end to end, every
byte of it becomes U+FFFD, those of complete characters too. So the text of a run is known only after the run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Decode: TypeAlias = Callable[[list[int]], str]

PARTIAL = "\ufffd"
CONTEXT = 6  # tokens decoded before a token: its spaces depend on them
_TAIL = 16  # tokens at the end of a prompt that a Detokenizer reads: a character has four bytes at most


class Codec(NamedTuple):
    """How ids become text."""

    decode: Decode
    byte_tokens: frozenset[int]  # those that decode as a unit with their neighbours
    is_silent: Callable[[int], bool]  # whether a token never has text, such as a skipped special token


def codec(tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> Codec:
    """The codec of a tokenizer; its byte tokens are called <0x00> to <0xFF>."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    named = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return codec_for(decode, [token for token in named if token is not None])


def codec_for(decode: Decode, ids: Sequence[int]) -> Codec:
    """The codec of any function from ids to text, for texts made of these `ids`."""
    return Codec(decode, _byte_tokens(decode, ids), functools.cache(lambda token: decode([token] * 4) == ""))


class Detokenizer:
    """The text of one row while its tokens come: each character belongs to the token that completes it.

    `feed` and `flush` return the texts that have become final since the last call, one for each token, in order. A
    token is held back while the next one may change its text: the beginning of a character, and a run of byte tokens
    until another token follows. All texts together are `decode(prompt + new)` without `decode(prompt)`, with two
    exceptions. If the prompt ends inside a character, the character belongs to the new token that completes it. If new
    byte tokens make the run at the prompt's end invalid, each of them is one U+FFFD.

    >>> row = Detokenizer(codec_for(lambda ids: bytes(ids).decode(errors="replace"), []))
    >>> [row.feed(byte) for byte in "né!".encode()], row.flush()
    ([['n'], [], ['', 'é'], ['!']], [])
    """

    def __init__(self, codec: Codec, prompt: Sequence[int] = ()):
        self._codec = codec
        self._before: list[int] = []  # the last tokens whose text is final
        self._base = ""  # their text
        self._held: list[int] = []  # tokens held back, silent ones included; the first is never silent
        self._is_run = False  # whether the held tokens are byte tokens
        self._shown = ""  # text of `_before` and the held tokens; not updated while byte tokens are held
        self._of_prompt = 0  # how many held tokens belong to the prompt
        for token in self._tail(prompt):
            self._add(token)
        self._of_prompt = len(self._held)

    def feed(self, token: int) -> list[str]:
        """Adds one token."""
        return self._without_prompt(self._add(token))

    def flush(self) -> list[str]:
        """The texts of all held tokens; no token follows."""
        return self._without_prompt(self._release())

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, from a place that is not in a run of byte tokens."""
        codec, start, visible = self._codec, len(prompt), 0
        while start > 0 and (visible < _TAIL or prompt[start] in codec.byte_tokens or codec.is_silent(prompt[start])):
            start -= 1
            visible += not codec.is_silent(prompt[start])
        return list(prompt[start:])

    def _without_prompt(self, texts: list[str]) -> list[str]:
        dropped = min(self._of_prompt, len(texts))
        self._of_prompt -= dropped
        return texts[dropped:]

    def _add(self, token: int) -> list[str]:
        if self._codec.is_silent(token):
            if not self._held:
                return [""]
            self._held.append(token)
            return []
        is_byte = token in self._codec.byte_tokens
        texts = [] if self._is_run == is_byte else self._release()
        if is_byte:
            self._is_run = True
            self._held.append(token)
            return texts
        return texts + self._add_ordinary(token)

    def _add_ordinary(self, token: int) -> list[str]:
        """Adds a token that is no byte token. Held tokens are of the same kind and lack the end of a character."""
        self._trim()
        shown = self._shown
        whole = self._codec.decode([*self._before, *self._visible(), token])
        if self._held and whole == shown:  # the character is still incomplete
            self._held.append(token)
            return []
        if self._held and not whole.startswith(shown):  # the token completes it
            shown = shown[:-1]
        texts = self._release(shown)
        added = beyond(shown, whole)
        if added.endswith(PARTIAL):
            self._held, self._shown = [token], whole
            return texts
        self._before.append(token)
        self._base = self._shown = whole
        return [*texts, added]

    def _release(self, shown: str | None = None) -> list[str]:
        """Texts of the held tokens, which are final now and move to `_before`; `shown` is the text up to here."""
        if not self._held:
            return []
        visible = self._visible()
        if self._is_run:
            shown = self._codec.decode(self._before + visible)
            texts = _of_bytes(beyond(self._base, shown), len(visible))
        else:
            shown = self._shown if shown is None else shown
            texts = [beyond(self._base, shown), *[""] * (len(visible) - 1)]
        spread = iter(texts)
        texts = ["" if self._codec.is_silent(token) else next(spread) for token in self._held]
        self._before += visible
        self._held, self._is_run = [], False
        self._base = self._shown = shown
        return texts

    def _visible(self) -> list[int]:
        return [token for token in self._held if not self._codec.is_silent(token)]

    def _trim(self) -> None:
        if len(self._before) > 2 * CONTEXT:
            self._before = self._before[-CONTEXT:]
            self._base, self._shown = (
                self._codec.decode(ids) for ids in (self._before, self._before + self._visible())
            )


def split(codec: Codec, prompt: Sequence[int], new: Iterable[int]) -> list[str]:
    """The text that each new token completes; see `Detokenizer`."""
    row = Detokenizer(codec, prompt)
    return [*itertools.chain.from_iterable(map(row.feed, new)), *row.flush()]


def beyond(before: str, text: str) -> str:
    """The part of `text` after its common beginning with `before`, which usually is all of `before`."""
    if text.startswith(before):
        return text[len(before) :]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
    return text[sum(1 for _ in same) :]


def completed_by(codec: Codec, before: Sequence[int], token: int) -> str:
    """The character that a byte token completes after those before it; U+FFFD if it completes none.

    Invalid bytes elsewhere in the run are ignored.
    """
    for count in range(min(3, len(before)) + 1):
        ids = [*before[len(before) - count :], token]
        twice = codec.decode(ids * 2)  # twice, as a space at the very beginning may be dropped
        if twice and PARTIAL not in twice:
            return twice[-1]
    return PARTIAL


def _of_bytes(text: str, count: int) -> list[str]:
    """Splits the text of `count` byte tokens: the character that each of them completes."""
    if text == PARTIAL * count:
        return [PARTIAL] * count
    sizes = [len(char.encode()) for char in text]
    texts = [""] * count
    if sum(sizes) > count:  # no tokenizer known does so
        texts[-1] = text
        return texts
    place = count - sum(sizes) - 1  # spaces at the very beginning may have been dropped
    for char, size in zip(text, sizes, strict=True):
        place += size
        texts[place] = char
    return texts


def _byte_tokens(decode: Decode, ids: Sequence[int]) -> frozenset[int]:
    """Those of `ids` that decode as a unit with their neighbours.

    Found by trial: next to a part of a character, all tokens of such a unit decode to U+FFFD.
    """
    alone = {token: decode([token] * 2) for token in set(ids)}
    parts = [token for token, text in alone.items() if text == PARTIAL * 2]
    whole = [token for token, text in alone.items() if text and PARTIAL not in text]

    def spoils(part: int, sound: Sequence[int]) -> bool:
        return decode([*sound, part]) == PARTIAL * (len(sound) + 1)

    short = [[token] * 2 for token in whole if len(alone[token]) <= 2 and alone[token].isascii()]
    trials = itertools.chain(short, _sound_runs(decode, ids, frozenset(parts)))
    found = next(((part, sound) for sound in trials for part in parts[:4] if spoils(part, sound)), None)
    if found is None:
        return frozenset()
    part, sound = found
    return frozenset(
        [token for token in parts if spoils(token, sound)] + [token for token in whole if spoils(part, [token] * 2)]
    )


def _sound_runs(decode: Decode, ids: Sequence[int], parts: frozenset[int]) -> Iterable[list[int]]:
    """The first few short runs of parts in `ids` that together form characters."""
    runs = (
        list(ids[start : start + size])
        for start in range(len(ids))
        if ids[start] in parts
        for size in (2, 3, 4)
        if parts.issuperset(ids[start : start + size])
    )

    def is_sound(run: list[int]) -> bool:
        # The run may spell U+FFFD itself in three bytes: its first two decode to two U+FFFD, if bytes are a unit.
        text = decode(run)
        return PARTIAL not in text or (text == PARTIAL and decode(run[:2]) == PARTIAL * 2)

    return itertools.islice(filter(is_sound, runs), 4)
