"""The draft lengths that verification is compiled for."""

from __future__ import annotations

# Widths of 1, 2, 3, 4, 6, 9, 17, 33, 65 tokens: each costs a compiled target pass, and a draft between two of them pays
# for the wider.
_USUAL = (0, 1, 2, 3, 5, 8, 16, 32, 64)


def up_to(longest: int, *, least: int = 0) -> tuple[int, ...]:
    """Buckets from `least` to `longest`.

    >>> up_to(8), up_to(6, least=1)
    ((0, 1, 2, 3, 5, 8), (1, 2, 3, 5, 6))
    """
    return (*(size for size in _USUAL if least <= size < longest), longest)


def holding(buckets: tuple[int, ...], draft_len: int) -> int:
    """The bucket that verifies a draft of this length: the least that holds it.

    >>> holding((0, 1, 2, 3, 5, 8), 4)
    5
    """
    return min(size for size in buckets if size >= draft_len)
