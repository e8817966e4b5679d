"""A fixed draft length."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from specjax.controllers.buckets import longest_draft
from specjax.types import Controller


def fixed(draft_len: int) -> Controller:
    """Drafts `draft_len` tokens (1 or more) in every round.

    Raises:
      ValueError: draft_len below 1; plain decoding is `specjax.autoregressive`.

    >>> fixed(4).longest
    4
    """
    return _fixed(longest_draft(draft_len, "draft_len"))


@functools.cache
def _fixed(draft_len: int) -> Controller:
    return Controller(
        init=lambda batch: jnp.full((batch,), draft_len, jnp.int32),
        draft_len=lambda state, rows: state,
        update=lambda state, info: state,
        buckets=(draft_len,),
    )
