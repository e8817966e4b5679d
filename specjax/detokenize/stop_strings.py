"""Stop strings: finds the end of a text while the text is generated."""

from __future__ import annotations

from collections.abc import Sequence


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several as a tuple. Raises ValueError for an empty string and for other types.

    >>> stop_strings("###")
    ('###',)
    """
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(each, str) for each in strings):
        raise ValueError(f"stop must be a string or a list of strings, got {stop!r}: ids go into stop_tokens.")
    if "" in strings:
        raise ValueError("stop holds an empty string, which ends every text at once: leave it out.")
    return tuple(strings)


class StopFinder:
    """Cuts the text of one row before its first stop string, which may span tokens and calls.

    `feed` takes the texts of tokens in order and returns those that are final, in order. Text that may be the beginning
    of a stop string is held back until this is decided. Once a stop string is `found`, nothing more is returned. The
    token that completes the stop string is the last one of the row: it and the tokens before it are returned, without
    the stop string.

    >>> finder = StopFinder(("END",))
    >>> [finder.feed([text]) for text in ("a", "b E", "N", "x", "EN", "D.")], finder.found
    ([['a'], [], [], ['b E', 'N', 'x'], [], ['', '']], True)
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held: list[str] = []
        self.found = False

    def feed(self, texts: Sequence[str]) -> list[str]:
        """The texts that are final now."""
        if self.found:
            return []
        if not self._stop:
            return list(texts)
        self._held += texts
        whole = "".join(self._held)
        start, undecided = self._start(whole), self._undecided(whole)
        # A stop string that begins earlier may still become complete; then the text ends there.
        if start is not None and start <= undecided:
            return self._cut(whole, start)
        return self._release(undecided)

    def flush(self) -> list[str]:
        """The remaining texts; no text follows."""
        whole = "".join(self._held)
        start = None if self.found else self._start(whole)
        return self._release(len(whole)) if start is None else self._cut(whole, start)

    def _start(self, whole: str) -> int | None:
        return min((place for place in map(whole.find, self._stop) if place >= 0), default=None)

    def _undecided(self, whole: str) -> int:
        """The start of the first incomplete stop string; the length of the text if there is none."""
        places = range(max(len(whole) - self._longest + 1, 0), len(whole))
        return next(
            (place for place in places if any(stop.startswith(whole[place:]) for stop in self._stop)), len(whole)
        )

    def _release(self, end: int) -> list[str]:
        count, length = 0, 0
        for text in self._held:
            length += len(text)
            if length > end:
                break
            count += 1
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _cut(self, whole: str, start: int) -> list[str]:
        end = start + min(len(stop) for stop in self._stop if whole.startswith(stop, start))
        cut, place = [], 0
        for text in self._held:
            if place >= end:
                break
            cut.append(text[: max(start - place, 0)])
            place += len(text)
        self._held, self.found = [], True
        return cut
