"""Work that a round does or leaves out: loops of one turn or none, where conditionals would copy what they carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import Array

_Carry = TypeVar("_Carry")


def run_if(runs: Array | bool, body: Callable[..., _Carry], carry: _Carry, *given: Any) -> _Carry:
    """`body(carry, *given)` where `runs`, else `carry`; what does not run costs nothing, and nothing is copied.

    XLA copies whole caches into `lax.cond` and `lax.switch` and out of them again, in every round. A loop that turns
    once or never leaves them in place.

    Args:
      runs: [] bool; a Python bool decides while tracing.
      body: keeps the structure, shapes and dtypes of its first argument.
      carry: any pytree of arrays.
      given: what else it reads that is new in this round. XLA may compute with what it closes over ahead of the loop,
        needed or not: good for parameters, a waste for anything else.

    >>> run_if(jnp.bool_(False), lambda x, y: x + y, jnp.int32(1), jnp.int32(1)).tolist()
    1
    """
    if runs is True or runs is False:
        return body(carry, *given) if runs else carry

    def turn(index: Array, carry: _Carry) -> _Carry:
        _, inside = lax.optimization_barrier((index, given))  # behind the index, which only the loop knows
        return body(carry, *inside)

    return lax.fori_loop(0, runs.astype(jnp.int32), turn, carry)


def zeros_like(make: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in the shapes of what `make(*arguments)` would return; it does not run."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(make, *arguments))
