"""Two more after a full acceptance, one less otherwise: the heuristic that users of transformers know."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax.controllers.buckets import longest_draft, up_to
from specjax.types import Array, Controller, Round, Rows


@functools.cache
def additive(longest: int = 16, start: int | None = None, *, up: int = 2, down: int = 1) -> Controller:
    """After a round that kept its whole draft a row drafts `up` tokens more, after any other `down` fewer; 1 or more.

    It knows no costs: on a machine where a wide pass is dear it drafts too much, and it never stops speculating. Its
    state, the draft lengths [B] int32, goes from call to call as `controller_state`.

    Args:
      longest: K, the most it drafts.
      start: of every row, at first; default 5, or `longest` where that is less.
      up, down: its steps.

    Raises:
      ValueError: not 1 <= start <= longest, or a step below 0.

    Source: transformers' assisted generation with `num_assistant_tokens_schedule="heuristic"`; unlike there, rows have
    lengths of their own and there is a most.

    >>> additive(8).longest
    8
    """
    longest = longest_draft(longest, "longest")
    start = min(5, longest) if start is None else start
    if not 1 <= start <= longest or min(up, down) < 0:
        raise ValueError(
            f"additive needs 1 <= start <= longest and steps of 0 or more, got start={start}, longest={longest}, "
            f"up={up}, down={down}."
        )
    up, down = min(up, longest), min(down, longest)  # larger steps lead no further, and could wrap

    def update(state: Array, info: Round) -> Array:
        asked = info.draft_lengths
        # A draft that a limit or a stop token cut short says nothing of the length that was wanted.
        was_judged = (asked >= jnp.minimum(state, longest)) & (info.num_emitted > 0)
        moved = jnp.where(info.num_accepted >= asked, state + up, state - down)
        return jnp.where(was_judged, jnp.clip(moved, 1, longest), state)

    def draft_len(state: Array, rows: Rows) -> Array:
        del rows
        return state

    return Controller(
        init=lambda batch: jnp.full((batch,), start, jnp.int32),
        draft_len=draft_len,
        update=update,
        buckets=up_to(longest, least=1),
    )
