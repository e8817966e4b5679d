"""The loop: rounds with a draft and plain rounds, as the controller decides, in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.decode.round import Propose, draft, draft_nothing, play_round
from specjax.decode.run_if import run_if
from specjax.decode.state import Carry
from specjax.decode.widths import empty_round
from specjax.types import Array, Params, PyTree, Round, Rows, Setup

# What to record of a round: (record so far, [B] bool whether a row took part, Round) -> record.
RecordFn = Callable[[Any, Array, Round], Any]
# Whether there is another round: (rows, record so far) -> [] bool.
ContinueFn = Callable[[Rows, Any], Array]


MOST_ROUNDS = 2**16  # between two tests of the rows: a dispatch of a stream keeps a record of each round


class _Run(NamedTuple):
    carry: Carry
    record: PyTree


def run(
    setup: Setup, params: Params, carry: Carry, record: PyTree, record_fn: RecordFn, continue_fn: ContinueFn
) -> tuple[Carry, PyTree]:
    """Runs rounds as long as `continue_fn` returns True.

    If no row has a draft, the round is a plain one, provided that `setup.has_plain_rounds`. Plain rounds have a loop of
    their own inside the other, so a sequence of plain rounds costs what plain decoding costs. Nothing
    for drafts is in that loop. It also needs one loop condition a round only: on a GPU the host waits for each
    condition (benchmarks/investigations/gpu_loops.py measures how long).
    """

    def round_with(propose: Propose) -> Callable[[_Run], _Run]:
        def body(so_far: _Run) -> _Run:
            played = play_round(setup, params, so_far.carry, propose)
            record = record_fn(so_far.record, played.took_part, played.round)
            if played.happened is not True:
                record = jax.tree.map(lambda new, old: jnp.where(played.happened, new, old), record, so_far.record)
            return _Run(played.carry, record)

        return body

    plainly, drafting = round_with(draft_nothing), round_with(draft)

    def has_next(so_far: _Run) -> Array:
        return continue_fn(so_far.carry.rows, so_far.record)

    def both(so_far: _Run) -> _Run:
        so_far = lax.while_loop(lambda x: has_next(x) & (jnp.max(x.carry.draft_lengths) == 0), plainly, so_far)
        return run_if(has_next(so_far), drafting, so_far)

    turn = plainly if setup.longest == 0 else both if setup.has_plain_rounds else drafting
    end = lax.while_loop(has_next, turn, _Run(carry, record))
    return end.carry, end.record


def one_round(setup: Setup, params: Params, carry: Carry) -> tuple[Carry, Round]:
    """One round, with a draft or plain. If no row had a draft, the plain round that follows."""
    record = (jnp.bool_(False), empty_round(setup, carry.rows.lengths.shape[0]))
    carry, (_, info) = run(
        setup, params, carry, record,
        record_fn=lambda so_far, took_part, info: (jnp.bool_(True), info),
        continue_fn=lambda rows, so_far: ~so_far[0],
    )  # fmt: skip
    return carry, info
