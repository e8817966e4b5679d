"""Checks of numbers that callers pass: a valid number is used as it is, any other is refused with the valid range.

Programs use int32. A cast to int32 wraps: 2**32 + 5 would silently become 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.traced import is_traced, known

LEAST, MOST = int(np.iinfo(np.int32).min), int(np.iinfo(np.int32).max)


def array(value: Any, name: str, shape: str) -> Any:
    """The value as an array, or a ValueError where it is ragged."""
    try:
        if is_traced(value) and not isinstance(value, jax.Array):
            return jnp.asarray(value)  # a list of traced numbers
        return value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name} must be one array {shape}, got rows of different lengths: pad them (specjax.text.pad_prompts for "
            "prompts, -1 for ids)."
        ) from None


def whole(value: Any, name: str, shape: str, *, ids: bool = False) -> Any:
    """The value as an array of integers of any width; of dtype object where 64 bits are too few.

    Raises ValueError for other numbers and for text. `ids`: the integers are token ids.
    """
    value = array(value, name, shape)
    if value.dtype == object and value.size and all(isinstance(one, int) for one in value.flat):
        return value
    if value.dtype.kind in "US" and ids:
        raise ValueError(
            f"{name} must hold token ids {shape}, got text: encode it first, specjax.text.encode(tokenizer, texts), or "
            "call specjax.text.generate_text, which takes strings."
        )
    if value.dtype.kind in "US":
        raise ValueError(f"{name} must hold whole numbers {shape}, got text, {value.tolist()!r}: pass int(...) of it.")
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers {shape}, got dtype {value.dtype}: pass whole numbers, int32.")
    return value


def exact(value: Any, name: str, *, least: int = LEAST, most: int = MOST) -> Any:
    """The integers as int32. Raises ValueError for a value outside least..most, if the values are known."""
    host = known(value)
    if host is not None and (is_bad := np.asarray((host < least) | (host > most))).any():
        raise ValueError(f"{name} must be in {least}..{most}, got {host[is_bad].flat[0]}.")
    return value.astype(np.int32)


def at_most(value: Any, name: str, *, least: int) -> Any:
    """Upper limits as int32: a value above int32 means no limit.

    Raises ValueError for a value below `least`, if the values are known.

    >>> at_most(np.array([5, 2**40]), "max_new_tokens", least=1).tolist()
    [5, 2147483647]
    """
    host = known(value)
    if host is not None and np.any(host < least):
        raise ValueError(f"{name} must be {least} or more, got {host.min()}.")
    if value.dtype == object:
        value = np.minimum(value, MOST)  # of a single number, a Python int
    elif jnp.iinfo(value.dtype).max > MOST:
        limit = np.minimum if isinstance(value, np.ndarray) else jnp.minimum
        value = limit(value, np.array(MOST, value.dtype))
    return np.asarray(value, np.int32) if isinstance(value, int) else value.astype(np.int32)


def padding(value: Any) -> Any:
    """The integers as int32. Values that int32 cannot hold are known to be padding, so they may change."""
    return (np.clip(value, LEAST, MOST) if value.dtype == object else value).astype(np.int32)


def static(value: Any, name: str, *, least: int = 1, most: int = MOST) -> int:
    """One whole number that a program is compiled for: an int, or an array without axes.

    Raises ValueError for anything else.

    >>> static(np.array(3), "capacity")
    3
    """
    number = _scalar(value, name)
    is_whole = isinstance(number, int) and not isinstance(number, bool)
    if not is_whole or not least <= number <= most:
        is_small = not is_whole or number < least
        wanted = f"{least} or more" if most == MOST and is_small else f"in {least}..{most}"
        raise ValueError(f"{name} must be {'' if is_whole else 'a whole number, '}{wanted}, got {number!r}.")
    return int(number)


def real(value: Any, name: str, is_valid: Callable[[float], bool], wanted: str) -> float:
    """One number that a program is compiled for, as `static`. Raises ValueError if it is no number or not valid.

    >>> real(np.array(0.5), "threshold", lambda x: 0 <= x <= 1, "in 0..1")
    0.5
    """
    number = _scalar(value, name)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not is_valid(number):
        raise ValueError(f"{name} must be {'' if is_number else 'a number, '}{wanted}, got {number!r}.")
    return float(number)


def _scalar(value: Any, name: str) -> Any:
    """The Python number in an array without axes; anything else unchanged. Raises ValueError if it is traced."""
    if is_traced(value):
        raise ValueError(f"{name} must be known while tracing, and it is traced: pass a Python number.")
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    return value.item() if is_array and value.ndim == 0 else value
