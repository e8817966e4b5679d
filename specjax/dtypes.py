"""The dtypes that parameters may have."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def floating(given: Any) -> np.dtype:
    """The dtype of parameters, given as a dtype or by name.

    Raises ValueError for an unknown one, for integers, and for float64, which JAX would silently turn into float32.

    >>> floating("bfloat16")
    dtype(bfloat16)
    """
    try:
        dtype = jnp.dtype(given)
    except TypeError as error:
        raise ValueError(f"unknown dtype {given!r}: try float32, bfloat16 or float16.") from error
    if dtype == np.float64:
        raise ValueError("parameters cannot be float64: float32 is the widest here.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"parameters cannot be {dtype}: try float32, bfloat16 or float16.")
    return dtype
