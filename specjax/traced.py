"""Whether a value is known on the host, or is still being traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_traced(tree: Any) -> bool:
    """Whether any leaf belongs to a trace under way."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def refuse_traced(what: str, instead: str, tree: Any = ()) -> None:
    """Raises ValueError inside a trace: if a leaf is traced, or if a new array would be traced."""
    # Under jit, parameters from a closure are plain arrays, but every new array is traced.
    if is_traced((tree, jnp.zeros(()))):
        raise ValueError(f"{what} on the host and cannot be traced: {instead}")


def known(value: Any) -> np.ndarray | None:
    """The value on the host; None while it is traced, or if parts of it lie in other processes."""
    if is_traced(value):
        return None
    is_elsewhere = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(value))
    return None if is_elsewhere else np.asarray(value)
