"""The state that one round passes on to the next."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from specjax.types import Array, Params, PyTree, Rows, Setup, Stats, Status


class Learnt(NamedTuple):
    """States that earlier calls returned; None to start afresh."""

    controller: PyTree | None = None
    drafter: PyTree | None = None


class Carry(NamedTuple):
    """The arrays that a round changes: the carry of the loop.

    Invariant between rounds: the target's cache holds all tokens of a row but the last, and the drafter has read them.
    """

    rows: Rows
    target_cache: PyTree
    drafter_state: PyTree
    controller_state: PyTree
    draft_lengths: Array  # [B] int32, tokens to draft for each row in the next round
    stats: Stats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A generation under way, for `specjax.step`: a pytree whose static part is the setup.

    Parameters are leaves of it: `dataclasses.replace(state, params=...)` continues with other parameters.
    """

    setup: Setup = dataclasses.field(metadata={"static": True})
    params: Params
    carry: Carry

    @property
    def rows(self) -> Rows:
        """Text, lengths, statuses and settings of each row."""
        return self.carry.rows

    @property
    def stats(self) -> Stats:
        """Counts since the start."""
        return self.carry.stats

    @property
    def is_done(self) -> Array:
        """[] bool: whether all rows have ended."""
        return (self.carry.rows.status != Status.ACTIVE).all()
