"""The status of a row: active, or how it ended."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """Whether a row is active, or how it ended; `describe()` adds the remedy. Stored per row as int32."""

    ACTIVE = 0
    LENGTH = 1
    STOPPED = 2
    CACHE_FULL = 3
    NON_FINITE = 4
    BAD_PROMPT = 5
    DEAD_END = 6

    def describe(self) -> str:
        """One sentence: what happened and, where something went wrong, what to do."""
        return _STATUS_TEXT[self]

    @property
    def is_trouble(self) -> bool:
        """Whether a problem ended the row, and not a limit or a stop token."""
        return self > Status.STOPPED


_STATUS_TEXT = {
    Status.ACTIVE: "still generating",
    Status.LENGTH: "reached max_new_tokens",
    Status.STOPPED: "reached a stop token or a stop string",
    Status.CACHE_FULL: "the row filled its buffers: pass a larger capacity or ask for fewer new tokens",
    Status.NON_FINITE: (
        "the target's logits held a NaN, +inf, or nothing but -inf: the tokens before that point are valid; "
        "check the parameters, try float32, and see that the text fits into the model's positions (max_positions)"
    ),
    Status.BAD_PROMPT: (
        "the prompt was empty, longer than its padded width, or held an id outside the vocabulary: nothing was done"
    ),
    Status.DEAD_END: (
        "penalties, bias, bad words, minimum length or the custom processor left no token to choose, or made NaN or "
        "+inf: the tokens before that point are valid; let a grammar allow a stop token where it ends"
    ),
}
