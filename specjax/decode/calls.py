"""Calls that Python or JAX would refuse in words that help nobody: settings in the wrong place, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

from specjax.traced import is_traced
from specjax.types import Array, Generation, LogProbs, PyTree, Sampling

_P = ParamSpec("_P")
_R = TypeVar("_R")


def names_sampling(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, but `temperature=0.8` says that it belongs into `sampling=specjax.Sampling(temperature=0.8)`."""

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        stray = {name: value for name, value in kwargs.items() if name in Sampling._fields}
        if stray:
            said = ", ".join(f"{name}={value!r}" for name, value in stray.items())
            raise TypeError(
                f"{function.__name__} takes no {', '.join(stray)}: pass sampling=specjax.Sampling({said}), a scalar or "
                "one number a row."
            )
        return function(*args, **kwargs)

    return checked


def without_gradient(run: Callable[..., Generation], *given: PyTree) -> Generation:
    """`run(*given)`, whose tokens can be used inside a function that is differentiated with respect to what is given.

    The loop has no gradient. Who differentiates its log-probabilities all the same is told what to do instead.
    """
    if not is_traced(given):
        return run(*given)
    out = run(*jax.lax.stop_gradient(given))
    return out._replace(log_probs=_refuse(given, out.log_probs))


@jax.custom_vjp
def _refuse(given: PyTree, log_probs: LogProbs) -> LogProbs:
    del given
    return log_probs


def _forward(given: PyTree, log_probs: LogProbs) -> tuple[LogProbs, None]:
    del given
    return log_probs, None


def _backward(residuals: None, cotangents: LogProbs) -> tuple[Array, ...]:
    del residuals, cotangents
    raise ValueError(
        "no gradient flows through a generation: its log-probabilities are numbers, and its loop keeps no activations. "
        "Re-score the text by one forward pass over out.tokens (model.apply) and differentiate that, as "
        "docs/training.md does."
    )


_refuse.defvjp(_forward, _backward)
