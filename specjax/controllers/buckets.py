"""The draft lengths that verification is compiled for."""

from __future__ import annotations

from specjax import integers

MOST = 2**16 - 1  # of draft tokens in a round

# Target passes over 1, 2, 3, 4, 6, 9, 17, 33, 65 tokens. Each one is compiled; a draft between two of them costs
# as much as the wider one.
_USUAL = (0, 1, 2, 3, 5, 8, 16, 32, 64)


def up_to(longest: int, *, least: int = 0) -> tuple[int, ...]:
    """Buckets from `least` to `longest`.

    >>> up_to(8), up_to(6, least=1)
    ((0, 1, 2, 3, 5, 8), (1, 2, 3, 5, 6))
    """
    return (*(size for size in _USUAL if least <= size < longest), longest)


def longest_draft(value: object, name: str) -> int:
    """K, checked. Raises ValueError for anything but a whole number in 1..MOST."""
    try:
        return integers.static(value, name, most=MOST)
    except ValueError as error:
        raise ValueError(f"{error} For decoding without drafts use specjax.autoregressive.") from None


def holding(buckets: tuple[int, ...], draft_len: int) -> int:
    """The bucket that verifies a draft of this length: the least that holds it.

    >>> holding((0, 1, 2, 3, 5, 8), 4)
    5
    """
    return min(size for size in buckets if size >= draft_len)
