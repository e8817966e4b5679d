"""The width of a round: a shorter draft costs less.

A round is compiled at a few widths (`Controller.buckets`) and runs at the narrowest that holds its drafts. The results
of all widths are padded to the widest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from specjax.decode.run_if import run_if
from specjax.rows import is_active
from specjax.types import Array, Draft, LogProbs, PyTree, Round, Rows, Setup


class RoundResult(NamedTuple):
    """The target's result for a draft; the rows are not updated yet."""

    cache: PyTree  # the target's, with the accepted path
    status: Array  # [B] int32, a `Status`: of each row after the round
    round: Round
    hidden: tuple[Array, ...]  # [B, W+1, D] per layer the drafter asked for, at the root and along the accepted path


# (result, rows, draft) -> result: scores, verifies, emits and commits the draft with the cache of the result before.
ScoreToCommit = Callable[[RoundResult, Rows, Draft], RoundResult]


def at_narrowest_width(
    setup: Setup, score_to_commit: ScoreToCommit, initial: RoundResult, rows: Rows, draft: Draft
) -> tuple[RoundResult, Array | bool]:
    """Runs `score_to_commit` at the first width that holds the draft; no other width runs.

    The second result is whether it ran. An empty draft is left to a plain round, if the controller has plain rounds;
    then the first result is `initial`. The choice of a width is a sequence of `run_if`, because XLA copies
    the caches into `lax.switch` and out of it again.
    """
    widest = draft.tokens.shape[1]
    # A tree of fewer nodes is another tree: the loop cannot choose the nodes to drop.
    narrower = () if draft.parents is not None else (size for size in setup.controller.buckets if 0 < size < widest)
    widths = [*narrower, widest]

    def at(width: int) -> ScoreToCommit:
        def run(before: RoundResult, rows: Rows, draft: Draft) -> RoundResult:
            return pad_result(score_to_commit(before, rows, _first_places(draft, width)), initial)

        return run

    has_plain_rounds = setup.has_plain_rounds and widest > 0
    if len(widths) == 1 and not has_plain_rounds:
        return score_to_commit(initial, rows, draft), True
    needed = jnp.max(jnp.where(is_active(rows), draft.lengths, 0))
    chosen = jnp.searchsorted(jnp.asarray(widths, jnp.int32), needed, method="compare_all")
    result = initial
    for index, width in enumerate(widths):
        # Only changed arrays are carried: XLA copies a carried buffer that is read before the loop and after it.
        is_next = (chosen == index) & (needed > 0) if has_plain_rounds else chosen == index
        result = run_if(is_next, at(width), result, rows, draft)
    return result, needed > 0 if has_plain_rounds else True


def empty_round(setup: Setup, batch: int) -> Round:
    """An empty round, at the widest width."""
    longest, nodes = setup.longest, setup.num_nodes
    none, unscored = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, nodes), jnp.float32)
    emitted = jnp.zeros((batch, longest + 1), jnp.float32)
    return Round(
        tokens=jnp.full((batch, longest + 1), -1, jnp.int32),
        num_emitted=none,
        num_accepted=none,
        draft_tokens=jnp.full((batch, nodes), -1, jnp.int32),
        draft_lengths=none,
        draft_probs=unscored,
        target_log_probs=LogProbs(unscored, unscored),
        log_probs=LogProbs(emitted, emitted),
        at_leaf=none > 0,
        source=None if len(setup.drafter.names) == 1 else none - 1,
        path=None if setup.drafter.num_nodes is None else jnp.zeros((batch, longest), jnp.int32),
    )


def pad_result(result: RoundResult, like: RoundResult) -> RoundResult:
    """The result padded to as many places as `like` has."""
    hidden = tuple(_pad(x, wanted, 0) for x, wanted in zip(result.hidden, like.hidden, strict=True))
    return result._replace(round=pad_round(result.round, like.round), hidden=hidden)


def pad_round(narrow: Round, like: Round) -> Round:
    """The round padded to as many places as `like` has."""

    def both(values: LogProbs, wanted: LogProbs) -> LogProbs:
        return LogProbs(_pad(values.raw, wanted.raw, 0.0), _pad(values.processed, wanted.processed, 0.0))

    return narrow._replace(
        tokens=_pad(narrow.tokens, like.tokens, -1),
        draft_tokens=_pad(narrow.draft_tokens, like.draft_tokens, -1),
        draft_probs=_pad(narrow.draft_probs, like.draft_probs, 0.0),
        target_log_probs=both(narrow.target_log_probs, like.target_log_probs),
        log_probs=both(narrow.log_probs, like.log_probs),
        source=like.source if narrow.source is None else narrow.source,
        path=like.path if narrow.path is None else narrow.path,
    )


def _pad(values: Array, wanted: Array, filler: float) -> Array:
    widths = ((0, 0), (0, wanted.shape[1] - values.shape[1]), *((0, 0),) * (values.ndim - 2))
    return jnp.pad(values, widths, constant_values=filler)


def _first_places(draft: Draft, width: int) -> Draft:
    if width == draft.tokens.shape[1]:
        return draft
    return draft._replace(tokens=draft.tokens[:, :width], probs=None if draft.probs is None else draft.probs[:, :width])
