"""Makes the Context that a drafter or a verifier gets in a round."""

from __future__ import annotations

import jax
from jax.tree_util import Partial

from specjax import noise
from specjax.noise import Role
from specjax.sampling import processing
from specjax.types import Array, Context, Params, Processor, PyTree, Rows, Setup


def make_context(
    rows: Rows,
    target_cache: PyTree,
    *,
    vocab_size: int,
    processor: Processor | None = None,
    coupled: bool = False,
    target_params: PyTree = None,
) -> Context:
    """The context of these rows; `coupled` as the verifier asks for (see `types.Verifier`)."""
    draft_keys = Partial(_coupled_keys if coupled else _own_keys, rows)
    process = processing(rows, processor, vocab_size)
    return Context(rows, target_params, target_cache, process, draft_keys, vocab_size)


def _own_keys(rows: Rows, step: Array | int) -> Array:
    keys = noise.derive(rows.keys, Role.DRAFT, rows.rounds)
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def _coupled_keys(rows: Rows, step: Array | int) -> Array:
    return noise.derive(rows.keys, Role.TARGET, rows.lengths + step)


def context_of(setup: Setup, params: Params, rows: Rows, target_cache: PyTree) -> Context:
    """The context of these rows, for the drafter and the verifier of a generation."""
    return make_context(
        rows,
        target_cache,
        vocab_size=setup.model.vocab_size,
        processor=setup.processor,
        coupled=setup.verifier.coupled,
        target_params=params.target,
    )
