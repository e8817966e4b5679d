"""Whole numbers that callers pass: each is used with the meaning it has, or refused with the range it must be in.

Programs hold int32. A cast to it wraps: 2**32 + 5 would become 5 without a word.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.traced import known

LEAST, MOST = int(np.iinfo(np.int32).min), int(np.iinfo(np.int32).max)


def array(value: Any, name: str, shape: str) -> Any:
    """The value as an array, or a ValueError where it is ragged."""
    try:
        return value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name} must be one array {shape}, got rows of different lengths: pad them (specjax.text.pad_prompts for "
            "prompts, -1 for ids)."
        ) from None


def whole(value: Any, name: str, shape: str) -> Any:
    """The value as an array of integers, of whatever width. Raises ValueError for other numbers and for text."""
    value = array(value, name, shape)
    if value.dtype == object and all(isinstance(one, int) for one in value.flat):
        value = np.asarray(np.clip(value, -(2**63), 2**63 - 1), np.int64)  # still far outside of every range
    if value.dtype.kind in "US":
        raise ValueError(
            f"{name} must hold token ids {shape}, got text: encode it first, specjax.text.encode(tokenizer, texts), or "
            "call specjax.text.generate_text, which takes strings."
        )
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers {shape}, got dtype {value.dtype}: pass whole numbers, int32.")
    return value


def exact(value: Any, name: str, *, least: int = LEAST, most: int = MOST) -> Any:
    """The integers as int32, where a value outside least..most has no meaning. Raises ValueError for one, if known."""
    host = known(value)
    if host is not None and ((host < least) | (host > most)).any():
        bad = host[(host < least) | (host > most)].flat[0]
        raise ValueError(f"{name} must be in {least}..{most}, got {bad}.")
    return value.astype(np.int32)


def at_most(value: Any, name: str, *, least: int) -> Any:
    """The integers as int32, where a value means "so many at most": above int32 it means no limit. Raises ValueError
    for one below `least`, if known.

    >>> at_most(np.array([5, 2**40]), "max_new_tokens", least=1).tolist()
    [5, 2147483647]
    """
    host = known(value)
    if host is not None and (host < least).any():
        raise ValueError(f"{name} must be {least} or more, got {host.min()}.")
    if jnp.iinfo(value.dtype).max > MOST:
        limit = np.minimum if isinstance(value, np.ndarray) else jnp.minimum
        value = limit(value, np.array(MOST, value.dtype))
    return value.astype(np.int32)


def static(value: Any, name: str, *, least: int = 1, most: int = MOST) -> int:
    """One whole number that a program is compiled for. Raises ValueError for anything else."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        wanted = f"{least} or more" if most == MOST else f"in {least}..{most}"
        raise ValueError(f"{name} must be {'' if is_whole else 'a whole number, '}{wanted}, got {value!r}.")
    return int(value)
