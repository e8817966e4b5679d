"""What rounds cost on one device: a small table, measured once by `specjax.profile` and kept as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

_log = logging.getLogger(__name__)

FORMAT = 6  # raised where fields change, or what their numbers mean


class Costs(NamedTuple):
    """Seconds, for one number of rows and one length of the text in the cache. K is the profile's longest draft."""

    batch: int
    context: int  # tokens in the cache of a row
    plain: float  # one autoregressive step
    rounds: tuple[float, ...]  # [K+1]: a whole round with a draft of 0, 1, ..., K tokens; 0 is a plain step inside it
    drafts: tuple[float, ...]  # [K+1]: of that, the drafting
    change: float  # what a draft after a round without one costs on top, going back to such rounds included

    def in_steps(self) -> tuple[float, ...]:
        """[K+1]: rounds, in plain steps."""
        return tuple(whole / self.plain for whole in self.rounds)

    def verification(self) -> tuple[float, ...]:
        """[K+1]: rounds less their drafting: the target's pass over K + 1 tokens, acceptance, and what goes with it."""
        return tuple(whole - draft for whole, draft in zip(self.rounds, self.drafts, strict=True))


class Profile(NamedTuple):
    """Costs on one device, for one target, drafter and way to decode."""

    device: str  # as jax calls its kind
    buckets: tuple[int, ...]  # draft lengths that verification was compiled for
    costs: tuple[Costs, ...]
    about: tuple[tuple[str, str], ...] = ()  # what was measured, and with which versions; for people

    @property
    def longest(self) -> int:
        """K."""
        return self.buckets[-1]

    def at(self, batch: int, context: float) -> Costs:
        """Costs for as many rows and so long a text: between measured ones in proportion, outside of them the nearest.

        >>> few, many = (Costs(b, 64, 1.0 * b, (1.0 * b, 2.0 * b), (0.0, 0.5), 0.0) for b in (1, 3))
        >>> Profile("chip", (0, 1), (few, many)).at(2, 500).rounds
        (2.0, 4.0)
        """
        by_batch = sorted({costs.batch for costs in self.costs})
        parts = [_along([c for c in self.costs if c.batch == b], "context", context) for b in by_batch]
        return _along(parts, "batch", batch)._replace(batch=batch, context=round(context))

    def contexts(self) -> list[int]:
        """The measured ones, ascending."""
        return sorted({costs.context for costs in self.costs})

    def warn_unless_here(self, batch: int) -> None:
        """Logs a warning, while tracing, where the profile is of another device, or not of as many rows as `batch`."""
        here = jax.devices()[0].device_kind
        if self.device != here:
            _log.warning(
                "this profile is of %s, but this device is %s: measure a profile here with specjax.profile",
                self.device, here,
            )  # fmt: skip
        measured = sorted({found.batch for found in self.costs})
        if not measured[0] <= batch <= measured[-1]:
            _log.warning(
                "%d rows, but the profile is of %d to %d: costs of the nearest are used; profile with "
                "batch_sizes=(%d,)", batch, measured[0], measured[-1], batch,
            )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it."""
        costs = [{**c._asdict(), "rounds": list(c.rounds), "drafts": list(c.drafts)} for c in self.costs]
        return {
            "format": FORMAT,
            "device": self.device,
            "buckets": list(self.buckets),
            "costs": costs,
            "about": dict(self.about),
        }

    def save(self, path: str | Path) -> None:
        """Writes JSON; whole, or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.{np.random.default_rng().integers(2**32):08x}.part")
        half.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        half.replace(path)


def from_json(data: Mapping[str, Any]) -> Profile:
    """A profile from plain data.

    Raises:
      ValueError: it is none, or of another format; what is wrong is said.

    >>> costs = Costs(1, 64, 1.0, (1.0, 1.2), (0.0, 0.1), 0.1)
    >>> from_json(Profile("chip", (0, 1), (costs,)).as_json()).at(1, 64) == costs
    True
    """
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']}, this version reads {FORMAT}")
        costs = tuple(
            Costs(
                int(c["batch"]), int(c["context"]), float(c["plain"]), tuple(map(float, c["rounds"])),
                tuple(map(float, c["drafts"])), float(c["change"]),
            )
            for c in data["costs"]
        )  # fmt: skip
        about = tuple((str(name), str(value)) for name, value in data["about"].items())
        found = Profile(str(data["device"]), tuple(map(int, data["buckets"])), costs, about)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"this is no profile ({said}): make one by specjax.profile.") from None
    check(found)
    return found


def load(path: str | Path) -> Profile:
    """The profile in a file that `Profile.save` wrote.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        is_there = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {is_there}: make a profile by specjax.profile(...) and .save(path).")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): make the profile again, by specjax.profile.") from None
    try:
        return from_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check(profile: Profile) -> None:
    """Raises ValueError where numbers are missing, not finite or not positive."""
    if not isinstance(profile, Profile):
        raise ValueError(
            "profile must be a specjax.costs.Profile, what specjax.profile(...) or costs.load(path) returns; got "
            f"{type(profile).__name__}."
        )
    if not isinstance(profile.costs, tuple) or not isinstance(profile.buckets, tuple):
        raise ValueError("a profile's costs and buckets are tuples: make it by specjax.profile or costs.load(path).")
    if (
        not profile.costs
        or not profile.buckets
        or list(profile.buckets) != sorted(set(profile.buckets))
        or profile.buckets[0] != 0
    ):
        raise ValueError(
            f"a profile needs costs and ascending buckets from 0 on, got {len(profile.costs)} and {profile.buckets}."
        )
    for costs in profile.costs:
        where = f"the profile's costs for batch {costs.batch}, context {costs.context}"
        if len(costs.rounds) != profile.longest + 1 or len(costs.drafts) != profile.longest + 1:
            raise ValueError(f"{where} must hold {profile.longest + 1} rounds and drafts, one for each draft length.")
        if not np.all(np.isfinite((costs.plain, *costs.rounds, *costs.drafts, costs.change))):
            raise ValueError(f"{where} hold numbers that are not finite.")
        if min(costs.plain, *costs.rounds) <= 0:
            raise ValueError(f"{where} hold a time of 0 or less.")


def _along(parts: list[Costs], axis: str, value: float) -> Costs:
    """One-dimensional interpolation of everything measured, at `value` of the field `axis`."""
    places = [getattr(part, axis) for part in parts]
    order = np.argsort(places)

    def at(values: list[float]) -> float:
        return float(np.interp(value, np.asarray(places, float)[order], np.asarray(values)[order]))

    return parts[0]._replace(
        plain=at([part.plain for part in parts]),
        rounds=tuple(at(list(times)) for times in zip(*(part.rounds for part in parts), strict=True)),
        drafts=tuple(at(list(times)) for times in zip(*(part.drafts for part in parts), strict=True)),
        change=at([part.change for part in parts]),
    )
