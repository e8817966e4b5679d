"""Several drafters in one program: each row takes the draft of the first that finds something."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.decode.run_if import run_if
from specjax.types import Array, Context, Draft, Drafter, DraftPlan, PyTree, Rows


class CombinedState(NamedTuple):
    """The states of the drafters, in order."""

    states: tuple[PyTree, ...]
    source: Array | None = None  # [B] int32, only between `propose` and `read`: whose draft each row took, -1 none


def first_of(*drafters: Drafter) -> Drafter:
    """Drafts each row by the first of `drafters` that has a draft for it; drafter_params are a tuple, one for each.

    A drafter after the first runs only in rounds in which a row is left to it. So `first_of(prompt_lookup(n_min=4),
    draft_model(model))` pays for the draft model only where the text does not repeat itself. How many tokens must match
    is what each drafter's `n_min` says. A draft model reads what others drafted before its own next draft.

    `Stats.drafted_by` and `accepted_by` count by drafter, in this order, and `Drafter.names` names them.

    Raises:
      ValueError: fewer than two drafters, drafters of trees, or drafters for different vocabularies.

    >>> from specjax import drafters, testing
    >>> both = first_of(drafters.prompt_lookup(), drafters.draft_model(testing.table_model(1, 8)))
    >>> both.names
    ('prompt_lookup', 'draft_model')
    """
    if len(drafters) < 2 or not all(isinstance(each, Drafter) for each in drafters):
        said = ", ".join(type(each).__name__ for each in drafters)
        raise ValueError(
            f"first_of takes two or more Drafters, one by one, got ({said}): call the makers of functions, and pass "
            "the parts of a list by first_of(*drafters)."
        )
    if any(each.num_nodes is not None for each in drafters):
        raise ValueError("first_of combines drafters of chains, and one of these drafts trees.")
    sizes = {each.vocab_size for each in drafters if each.vocab_size is not None}
    if len(sizes) > 1:
        raise ValueError(f"these drafters are for different vocabularies, of {sorted(sizes)} ids.")
    return _first_of(drafters)


@functools.cache
def _first_of(drafters: tuple[Drafter, ...]) -> Drafter:
    layers = tuple(sorted({layer for each in drafters for layer in each.hidden_layers}))
    learners = [place for place, each in enumerate(drafters) if each.learnt is not None]
    offsets = [sum(len(each.names) for each in drafters[:place]) for place in range(len(drafters))]

    def init(params: tuple[PyTree, ...], batch: int, *, learnt: Any, **sizes: Any) -> CombinedState:
        if not isinstance(params, tuple | list) or len(params) != len(drafters):
            said = f"{len(params)} of them" if isinstance(params, tuple | list) else f"a {type(params).__name__}"
            raise ValueError(
                f"first_of of {len(drafters)} drafters takes a tuple of as many drafter_params, in the same order, "
                f"got {said}."
            )
        known = dict(zip(learners, learnt, strict=True)) if learnt is not None else {}
        each = enumerate(zip(drafters, params, strict=True))
        return CombinedState(tuple(one.init(own, batch, learnt=known.get(at), **sizes) for at, (one, own) in each))

    def propose(params: Any, state: CombinedState, context: Context, plan: DraftPlan) -> tuple[Draft, CombinedState]:
        # A draft model may have been left out of rounds, and it then has text to catch up with.
        plan = plan._replace(may_skip=True)
        drafts, states, left = [], [], plan.lengths
        for place, (one, own, before) in enumerate(zip(drafters, params, state.states, strict=True)):

            def run(carry: Any, context: Context, left: Array, one=one, own=own, before=before) -> Any:
                return one.propose(own, _closed(carry[1], before), context, plan._replace(lengths=left))

            def nothing(run=run, before=before, left=left) -> Any:
                return run((None, before), context, left)

            shapes = jax.eval_shape(nothing)
            begun = _zeros(shapes[0]), _opened(before, shapes[1])
            made, after = run_if(place == 0 or jnp.any(left > 0), run, begun, context, left)
            if made.parents is not None:
                raise ValueError("first_of combines drafters of chains, and one of these drafts trees.")
            drafts.append(made._replace(lengths=jnp.minimum(made.lengths, left)))
            states.append(after)
            left = jnp.where(drafts[-1].lengths > 0, 0, left)
        draft, source = _merge(drafts, offsets)
        return draft, CombinedState(tuple(states), source)

    def read(params: Any, state: CombinedState, context: Context, tokens, hidden, keep) -> CombinedState:
        states = []
        for place, (one, own, before) in enumerate(zip(drafters, params, state.states, strict=True)):
            given = tuple(hidden[layers.index(layer)] for layer in one.hidden_layers)
            if state.source is None or one.defer is None:
                states.append(one.read(own, before, context, tokens, given, keep))
                continue
            # What it drafted itself it has in its state; what others drafted it reads later, from the row's text.
            last = offsets[place] + len(one.names)
            is_own = (state.source >= offsets[place]) & (state.source < last)

            def run(carry, opened, context, tokens, given, keep, one=one, own=own) -> Any:
                return one.read(own, _filled(carry, opened), context, tokens, given, keep)

            mine = jnp.where(is_own, keep, 0)
            after = jax.eval_shape(one.read, own, before, context, tokens, given, mine)
            begun = _closed(before, after)
            after = run_if(jnp.any(is_own), run, begun, before, context, tokens, given, mine)
            states.append(one.defer(after, jnp.where(is_own, 0, keep)))
        return CombinedState(tuple(states))

    def learnt(state: CombinedState, rows: Rows) -> tuple[PyTree, ...]:
        return tuple(drafters[place].learnt(state.states[place], rows) for place in learners)  # type: ignore[misc]

    return Drafter(
        propose,
        init,
        read,
        vocab_size=next((each.vocab_size for each in drafters if each.vocab_size is not None), None),
        hidden_layers=layers,
        learnt=learnt if learners else None,
        may_find_nothing=all(each.may_find_nothing for each in drafters),
        names=tuple(name for each in drafters for name in each.names),
    )


def _merge(drafts: list[Draft], offsets: list[int]) -> tuple[Draft, Array]:
    """Each row's first draft that is not empty, and whose it is."""
    wide = next((made.probs for made in drafts if made.probs is not None), None)
    tokens, lengths = drafts[0].tokens, jnp.zeros_like(drafts[0].lengths)
    source, probs = jnp.full_like(lengths, -1), wide
    for made, offset in zip(drafts, offsets, strict=True):
        takes = made.lengths > 0
        tokens = jnp.where(takes[:, None], made.tokens, tokens)
        lengths = jnp.where(takes, made.lengths, lengths)
        source = jnp.where(takes, offset + (0 if made.source is None else made.source), source)
        if probs is not None and wide is not None:
            own = jax.nn.one_hot(made.tokens, wide.shape[-1]) if made.probs is None else made.probs
            probs = jnp.where(takes[:, None, None], own, probs)
    return Draft(tokens, lengths, probs, source=source), source


# A drafter's state may have parts that only exist between `propose` and `read`, and are None otherwise. Work that is
# run or not must give one structure, so such parts are opened with zeros.


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _is_none(part: Any) -> bool:
    return part is None


def _opened(closed: PyTree, shapes: PyTree) -> PyTree:
    """`closed`, with zeros where it is None and `shapes` has arrays."""
    return jax.tree.map(lambda own, there: _zeros(there) if own is None else own, closed, shapes, is_leaf=_is_none)


def _closed(opened: PyTree, like: PyTree) -> PyTree:
    """`opened`, with None where `like` is None."""
    return jax.tree.map(lambda there, own: None if there is None else own, like, opened, is_leaf=_is_none)


def _filled(closed: PyTree, opened: PyTree) -> PyTree:
    """`closed`, with the parts of `opened` where it is None."""
    return jax.tree.map(lambda own, there: there if own is None else own, closed, opened, is_leaf=_is_none)
