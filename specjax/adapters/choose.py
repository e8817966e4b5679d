"""Chooses how to use a module's cache: tries several ways, the fastest first, and takes the first correct one."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax import integers
from specjax.adapters.cache_axes import slots_ignored
from specjax.adapters.cached_module import AT_END, AT_LENGTH, cached_module, row_by_row
from specjax.adapters.trial import Trial, cache_error, handles_trees, make_trial
from specjax.adapters.uncached import uncached, with_fresh_cache
from specjax.adapters.wrapped import NO_CACHE, TRIED, NoLogits, PassInput, Wrapped
from specjax.types import Model, PyTree

_log = logging.getLogger(__name__)


class Strategy(enum.StrEnum):
    """How a module's cache is used; `Adapted.describe` says which and why."""

    PER_ROW = "per-row"
    AT_END = "at-end"
    ROW_BY_ROW = "row-by-row"
    UNCACHED = "uncached"


_MEANING = {
    Strategy.PER_ROW: "in its own cache, which keeps a cursor for each row: rejected tokens are overwritten later",
    Strategy.AT_END: (
        "in its own cache, which keeps one cursor for all rows: the tokens of a round use the cache's last slots, "
        "its mask shows them, and accepted ones are copied to the end of their row"
    ),
    Strategy.ROW_BY_ROW: (
        "in its own cache, each row by itself under vmap, since rows of different lengths don't fit into one cursor"
    ),
    Strategy.UNCACHED: "without a cache: every pass reads the whole text again, so longer texts cost more",
}


class Adapted(NamedTuple):
    """Your module as a specjax Model, with its parameters.

    `model` is hashed by identity: adapt once, and use it in all calls. `params` are the module's parameters at the time
    it was adapted. After a training step pass the new ones, of the same structure; nothing is compiled anew.
    """

    model: Model
    params: PyTree
    strategy: Strategy
    notes: tuple[str, ...]  # why the faster strategies were not chosen

    def __repr__(self) -> str:
        """In short, without the parameters."""
        return f"Adapted(strategy={self.strategy.value!r}, vocab_size={self.model.vocab_size}, ...)"

    def describe(self) -> str:
        """How the module's cache is used and why, in sentences."""
        trees = "" if self.model.trees else " Chains of draft tokens only, no trees."
        return "\n".join([f"Runs {_MEANING[self.strategy]}.{trees}", *self.notes])


def choose(
    forms: Sequence[Wrapped],
    params: PyTree,
    *,
    vocab_size: int | None,
    max_positions: int | None,
    strategy: str | None,
) -> Adapted:
    """Checks the module, then tries its cache by every strategy that is allowed, and takes the first correct one.

    Args:
      forms: the module with each form of mask that it may need; the first form that makes it causal is taken.

    Raises:
      ValueError: the module is no causal language model, or the strategy asked for is not correct for it.
    """
    wanted = list(Strategy) if strategy is None else [_strategy(strategy)]
    wrapped, whole, failed, trial, size = _first_causal(forms, params, vocab_size)
    notes = [] if failed is None else [f"Not called without a cache: {failed}."]
    if wrapped.init_cache is None:
        wanted = [candidate for candidate in wanted if candidate is Strategy.UNCACHED]
        notes.append(wrapped.cache.note)
    elif wanted != [Strategy.UNCACHED] and (ignored := slots_ignored(wrapped.init_cache)) is not None:
        wanted = [candidate for candidate in wanted if candidate is Strategy.UNCACHED]
        notes.append(ignored)
    for candidate in wanted:
        try:
            model, reason = _attempt(candidate, wrapped, whole, trial, size, max_positions)
        except Exception as error:  # any error of someone else's module is a reason to try the next strategy
            model, reason = None, f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("ValueError: ")
            reason = reason.rstrip(".")
        if model is not None:
            if candidate is Strategy.UNCACHED and wrapped.init_cache is not None and wrapped.cache.note:
                notes.append(wrapped.cache.note)
            adapted = Adapted(model, params, candidate, tuple(notes))
            has_cache = wrapped.takes.cache is not None or wrapped.cache.note != NO_CACHE
            level = logging.WARNING if candidate is Strategy.UNCACHED and has_cache else logging.INFO
            _log.log(level, "adapted a module: %s", adapted.describe())
            return adapted
        notes.append(f"Not {candidate.value}: {reason}.")
    asked = "no strategy is" if strategy is None else f"strategy={strategy!r} is not"
    raise ValueError(
        f"{asked} right for this module. {' '.join(notes)} It was tried on texts of up to {TRIED} tokens: if its "
        "positions end earlier, pass max_positions=."
    )


def _attempt(
    candidate: Strategy, wrapped: Wrapped, whole: Wrapped, trial: Trial, vocab_size: int, max_positions: int | None
) -> tuple[Model | None, str]:
    """The module as a Model by this strategy; or None and the reason."""
    if candidate is Strategy.UNCACHED:
        return _checked(uncached(whole, vocab_size, max_positions=max_positions), trial)
    if candidate is Strategy.AT_END and wrapped.takes.mask is None:
        return None, "it takes no mask, which is needed to show the slots of a round's tokens"
    form = row_by_row(wrapped) if candidate is Strategy.ROW_BY_ROW else wrapped
    placement = AT_END if candidate is Strategy.AT_END else AT_LENGTH
    return _checked(cached_module(form, placement, vocab_size, max_positions=max_positions), trial)


def _checked(model: Model, trial: Trial) -> tuple[Model | None, str]:
    """The model if it gives the module's own logits, with trees only if those are correct too; else None, why."""
    slots = min(TRIED, model.max_positions or TRIED)
    wrong = cache_error(trial, model, slots)
    if wrong is not None:
        return None, wrong
    return model._replace(trees=model.trees and handles_trees(trial, model, slots)), ""


class _Causal(NamedTuple):
    """A module that is a causal language model over whole texts."""

    wrapped: Wrapped
    whole: Wrapped  # without its cache
    failed: str | None  # why `whole` gets a fresh cache in every pass, if it does
    trial: Trial
    vocab_size: int


def _first_causal(forms: Sequence[Wrapped], params: PyTree, vocab_size: int | None) -> _Causal:
    """The first of these forms that passes the checks. Raises the first form's error if none does."""
    errors = []
    for form in forms:
        try:
            whole, failed = _whole(form, params)
            columns = jax.eval_shape(whole.run, params, _feed()).logits.shape[-1]
            if vocab_size is not None and not 1 <= vocab_size <= columns:
                raise ValueError(
                    f"vocab_size must be in 1..{columns}, the columns of the module's logits, got {vocab_size}."
                )
            size = vocab_size or columns
            return _Causal(form, whole, failed, make_trial(whole, params, size), size)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _whole(wrapped: Wrapped, params: PyTree) -> tuple[Wrapped, str | None]:
    """The module over whole texts: without its cache, or with a fresh one if it cannot run without a cache."""
    error = _error_of(wrapped, params)
    if error is None:
        return wrapped, None
    if wrapped.init_cache is not None:
        alone, error = error, _error_of(with_fresh_cache(wrapped), params)
        if error is None:
            return with_fresh_cache(wrapped), alone
    said = (
        f"the module could not be called on tokens [3, 12]: {error}. It was called by {wrapped.takes.describe()}. "
        "Say otherwise by takes=adapters.Takes(...), or by call=, a function of your own."
    )
    ignored = None if wrapped.init_cache is None else slots_ignored(wrapped.init_cache)
    raise ValueError(f"{said} {wrapped.cache.note}".rstrip() if ignored is None else f"{ignored} And {said}")


def _error_of(wrapped: Wrapped, params: PyTree) -> str | None:
    try:
        jax.eval_shape(wrapped.run, params, _feed())
    except NoLogits:
        raise  # its message is complete
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return None


def count(value: Any, name: str) -> int | None:
    """An optional number. Raises ValueError for anything but None and a whole number of 1 or more."""
    return None if value is None else integers.static(value, name)


def _feed() -> PassInput:
    rows, width = 3, 12
    whole = jnp.zeros((rows, width), jnp.int32)
    return PassInput(whole, whole, jnp.zeros((rows, width, width), bool))


def _strategy(name: str) -> Strategy:
    try:
        return Strategy(name)
    except ValueError:
        raise ValueError(f"strategy must be one of {', '.join(Strategy)}, got {name!r}; None tries them all.") from None
