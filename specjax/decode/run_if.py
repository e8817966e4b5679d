"""Optional work of a round, as a loop of one turn or none: XLA's conditionals would copy the arrays that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import Array

_Carry = TypeVar("_Carry")


def run_if(runs: Array | bool, body: Callable[..., _Carry], carry: _Carry, *given: Any) -> _Carry:
    """`body(carry, *given)` if `runs`, else `carry`. If it does not run it costs nothing; no array is copied.

    XLA copies whole caches into `lax.cond` and `lax.switch` and out of them again, in every round. A loop that turns
    once or never leaves them in place.

    Args:
      runs: [] bool; a Python bool decides while tracing.
      body: keeps the structure, shapes and dtypes of its first argument.
      carry: any pytree of arrays.
      given: the other values of this round that `body` reads. XLA may move computations on closed-over values out of
        the loop, where they always run: good for parameters, a waste for anything else.

    >>> run_if(jnp.bool_(False), lambda x, y: x + y, jnp.int32(1), jnp.int32(1)).tolist()
    1
    """
    if runs is True or runs is False:
        return body(carry, *given) if runs else carry

    def turn(index: Array, carry: _Carry) -> _Carry:
        _, inside = lax.optimization_barrier((index, given))  # depends on the index, so it stays in the loop
        return body(carry, *inside)

    return lax.fori_loop(0, runs.astype(jnp.int32), turn, carry)


def zeros_like(make: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the shapes of what `make(*arguments)` would return; it does not run."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(make, *arguments))
