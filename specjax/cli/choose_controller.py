"""The controllers by name, for the command line; for the one that needs a profile, the profile is measured first."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from specjax import controllers, drafters
from specjax.cli.load_pair import Pair
from specjax.costs import Profile
from specjax.decode import plain
from specjax.profiling.measure import profile
from specjax.types import Controller, Sampling, Verifier

_CONTEXT_STEP = 64


class Policy(enum.StrEnum):
    """How the draft length is chosen."""

    fixed = "fixed"
    confidence = "confidence"
    additive = "additive"
    throughput = "throughput"


class Chosen(NamedTuple):
    """A controller, and the profile that it uses."""

    controller: Controller
    profile: Profile | None


def choose(
    policy: Policy,
    pair: Pair,
    draft_len: int,
    *,
    batch: int,
    context: int,
    sampling: Sampling,
    verifier: Verifier,
    kept_in: Path | None,
    busy: Callable[[str], AbstractContextManager[Any]],
) -> Chosen:
    """The controller of that name, which drafts at most `draft_len` tokens; none if the pair has no draft model.

    Args:
      pair: the models to profile.
      batch, context: rows, and tokens in the cache, of the profile.
      sampling, verifier: of the profile.
      kept_in: a folder for profiles; None measures anew.
      busy: for a spinner.
    """
    if pair.draft is None:
        if policy is not Policy.fixed:
            raise ValueError(f"--controller {policy} chooses how many tokens to draft: it needs a --draft model.")
        return Chosen(plain.CONTROLLER, None)
    if policy is Policy.fixed:
        return Chosen(controllers.fixed(draft_len), None)
    if policy is Policy.confidence:
        return Chosen(controllers.confidence(longest=draft_len), None)
    if policy is Policy.additive:
        return Chosen(controllers.additive(draft_len), None)
    found = profile(
        pair.target.model, pair.target.params, drafters.draft_model(pair.draft.model), pair.draft.params,
        batch_sizes=(batch,), contexts=(_shared(context, draft_len, pair),), longest=draft_len, sampling=sampling,
        verifier=verifier, cache=kept_in, busy=busy,
    )  # fmt: skip
    return Chosen(controllers.throughput(found), found)


def _shared(context: int, draft_len: int, pair: Pair) -> int:
    """A rounded text length near `context`, so that similar calls share one profile."""
    near = max(round(context / _CONTEXT_STEP), 1) * _CONTEXT_STEP
    most = pair.target.model.max_positions
    if most is None or near + draft_len < most:
        return near
    return max(min(context, most - draft_len - 1), 1)  # a round of K drafted tokens must fit behind it
