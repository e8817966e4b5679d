"""Draft two tokens more after a full acceptance, one less otherwise: the heuristic of transformers."""

from __future__ import annotations

import functools
import sys

import jax.numpy as jnp

from specjax import integers
from specjax.controllers.buckets import longest_draft, up_to
from specjax.types import Array, Controller, Round, Rows


def additive(longest: int = 16, start: int | None = None, *, up: int = 2, down: int = 1) -> Controller:
    """After a fully accepted draft a row drafts `up` tokens more, after any other draft `down` fewer; 1 at least.

    It ignores costs: on a machine where a wide pass is expensive it drafts too much, and it never stops speculating.
    Its state is the draft lengths, [B] int32; the next call may take it as `controller_state`.

    Args:
      longest: K, the most that it drafts.
      start: the first draft length of every row; default 5, or `longest` if that is less.
      up, down: the two steps.

    Raises:
      ValueError: not 1 <= start <= longest, or a step below 0.

    Source: transformers' assisted generation with `num_assistant_tokens_schedule="heuristic"`; unlike there, each row
    has its own length, and the length has a maximum.

    >>> additive(8).longest
    8
    """
    longest = longest_draft(longest, "longest")
    start = min(5, longest) if start is None else integers.static(start, "additive's start", most=longest)
    up, down = (
        # Larger steps have the same effect, and could overflow.
        min(integers.static(step, f"additive's {name}", least=0, most=sys.maxsize), longest)
        for name, step in (("up", up), ("down", down))
    )
    return _additive(longest, start, up, down)


@functools.cache
def _additive(longest: int, start: int, up: int, down: int) -> Controller:
    def update(state: Array, info: Round) -> Array:
        asked = info.draft_lengths
        # If a limit or a stop token cut the draft short, the round says nothing about the wanted length.
        was_judged = (asked >= jnp.minimum(state, longest)) & (info.num_emitted > 0)
        changed = jnp.where(info.num_accepted >= asked, state + up, state - down)
        return jnp.where(was_judged, jnp.clip(changed, 1, longest), state)

    def draft_len(state: Array, rows: Rows) -> Array:
        del rows
        return state

    return Controller(
        init=lambda batch: jnp.full((batch,), start, jnp.int32),
        draft_len=draft_len,
        update=update,
        buckets=up_to(longest, least=1),
    )
