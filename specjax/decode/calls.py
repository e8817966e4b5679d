"""Clear errors for two wrong uses: sampling settings in the wrong place, and gradients through a generation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from specjax.traced import is_traced
from specjax.types import Generation, LogProbs, PyTree, Sampling

_P = ParamSpec("_P")
_R = TypeVar("_R")


def names_sampling(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, but an argument such as `temperature=0.8` raises an error that says to use `specjax.Sampling`."""

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
    """`run(*given)`, whose tokens can be used inside a function that is differentiated with respect to `given`.

    The loop has no gradient. Differentiating its log-probabilities raises an error that says what to do instead.
    """
    if not is_traced(given):
        return run(*given)
    out = run(*jax.lax.stop_gradient(given))
    return out._replace(log_probs=_refuse(given, out.log_probs))


_NO_GRADIENT = (
    "no gradient flows through a generation: its log-probabilities are numbers, and its loop keeps no activations. "
    "Re-score the text by one forward pass over out.tokens (model.apply) and differentiate that, as "
    "docs/training.md does."
)
_FORWARD = " Then generate from jax.lax.stop_gradient(params): forward mode differentiates unused results too."

# Stands for the derivative of a generation's log-probabilities, [] float32. It cannot be run. Reverse mode only
# transposes it, and only where its result is used.
_change = Primitive("change_of_a_generation")


@_change.def_abstract_eval
def _shape(*tangents: Any) -> ShapedArray:
    del tangents
    return ShapedArray((), jnp.float32)


@_change.def_impl
def _run(*tangents: Any, **options: Any) -> NoReturn:
    del tangents, options
    raise ValueError(_NO_GRADIENT + _FORWARD)


def _transpose(cotangent: Any, *tangents: Any) -> list[None]:
    if isinstance(cotangent, ad.Zero):
        return [None] * len(tangents)
    raise ValueError(_NO_GRADIENT)


ad.primitive_jvps[_change] = _run
ad.primitive_transposes[_change] = _transpose
batching.primitive_batchers[_change] = lambda tangents, axes: (_change.bind(*tangents), None)
mlir.register_lowering(_change, _run)


@jax.custom_jvp
def _refuse(given: PyTree, log_probs: LogProbs) -> LogProbs:
    del given
    return log_probs


@_refuse.defjvp
def _differentiate(primals: tuple[PyTree, LogProbs], tangents: tuple[PyTree, LogProbs]) -> tuple[LogProbs, LogProbs]:
    changes = [leaf for leaf in jax.tree.leaves(tangents[0]) if leaf.dtype != jax.dtypes.float0]
    change = _change.bind(*changes)
    return primals[1], jax.tree.map(lambda leaf: jnp.broadcast_to(change, leaf.shape), primals[1])
