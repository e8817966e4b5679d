"""Plain decoding as a speculation loop sees it: a drafter and a controller with which every round is a plain step.

`stream` and `trace` then serve a target that has no draft model; no draft is made, and a step costs what it costs in
`autoregressive`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from specjax.types import Array, Context, Controller, Draft, Drafter, DraftPlan, PyTree, Round, Rows


def _init(params: PyTree, context: Context, prompts: Array, hidden: Any, *, slots: int, longest: int) -> PyTree:
    del params, context, prompts, hidden, slots, longest
    return ()


def _propose(params: PyTree, state: PyTree, context: Context, plan: DraftPlan) -> tuple[Draft, PyTree]:
    """Traced for its shapes; never run, as the controller never asks for a draft."""
    del params
    batch = context.rows.lengths.shape[0]
    nothing = jnp.zeros((batch, plan.longest), jnp.int32)
    return Draft(nothing, jnp.zeros((batch,), jnp.int32), None), state


def _commit(params: PyTree, state: PyTree, context: Context, info: Round) -> PyTree:
    del params, context, info
    return state


def _no_draft(state: PyTree, rows: Rows) -> Array:
    del state
    return jnp.zeros_like(rows.lengths)


DRAFTER = Drafter(_init, _propose, _commit)
CONTROLLER = Controller(
    init=lambda batch: (),
    draft_len=_no_draft,
    update=lambda state, info: state,
    buckets=(0, 1),  # 1 is the least that K can be; its branch is compiled and never taken
)
