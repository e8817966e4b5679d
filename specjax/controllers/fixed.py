"""A fixed draft length."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax.types import Controller


@functools.cache
def fixed(draft_len: int) -> Controller:
    """Drafts `draft_len` tokens (1 or more) in every round.

    Raises:
      ValueError: draft_len below 1; plain decoding is `specjax.autoregressive`.

    >>> fixed(4).longest
    4
    """
    if draft_len < 1:
        raise ValueError(
            f"draft_len must be 1 or more, got {draft_len}. For decoding without drafts use specjax.autoregressive."
        )
    return Controller(
        init=lambda batch: jnp.full((batch,), draft_len, jnp.int32),
        draft_len=lambda state, rows: state,
        update=lambda state, info: state,
        buckets=(draft_len,),
    )
