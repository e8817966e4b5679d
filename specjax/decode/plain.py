"""Plain decoding as the loop sees it: nothing is ever drafted, and every round is a plain one.

Used by the autoregressive baseline, and by streams and traces of a target without a draft model.
"""

from __future__ import annotations

import jax.numpy as jnp

from specjax.types import Array, Context, Controller, Draft, Drafter, DraftPlan, Model, Processor, PyTree, Rows, Setup
from specjax.verify.rejection import rejection


def _propose(params: PyTree, state: PyTree, context: Context, plan: DraftPlan) -> tuple[Draft, PyTree]:
    """The empty draft; never called, because the controller's only draft length is 0."""
    del params, plan
    lengths = context.rows.lengths
    return Draft(jnp.zeros((lengths.shape[0], 0), jnp.int32), jnp.zeros_like(lengths), None), state


def _draft_len(state: PyTree, rows: Rows) -> Array:
    del state
    return jnp.zeros_like(rows.lengths)


DRAFTER = Drafter(_propose)
CONTROLLER = Controller(init=lambda batch: (), draft_len=_draft_len, update=lambda state, info: state, buckets=(0,))


def plain_setup(model: Model, capacity: int, processor: Processor | None = None) -> Setup:
    """The setup of plain decoding."""
    return Setup(model, DRAFTER, rejection(), CONTROLLER, capacity, processor)
