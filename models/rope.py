"""Rotary position embeddings and their scalings, read from a Hugging Face config."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from specjax.models.products import materialised
from specjax.types import Array


class Rope(NamedTuple):
    """Everything that turns a position into angles; hashable."""

    frequencies: tuple[float, ...]  # head_dim / 2 of them
    magnitude: float = 1.0  # factor on cos and sin (yarn)
    max_positions: int | None = None  # a hard limit, where exactness needs one


def from_config(config: dict[str, Any], head_dim: int) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    Raises:
      ValueError: a scaling that is unknown or cannot be exact under speculation.

    >>> len(from_config({"rope_theta": 10000.0}, 8).frequencies)
    4
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = {name: value for name, value in scaling.items() if value is not None}
    nested = [name for name, value in scaling.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"rope parameters per layer type ({', '.join(nested)}) are not supported.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    if not isinstance(theta, (int, float)):
        raise ValueError(f"config.json: rope_theta must be a number, got {theta!r}: fetch the file again.")
    theta = float(theta)
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported: this family rotates whole heads.")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"unknown rope scaling {kind!r}; known: {', '.join(sorted(_SCALINGS))}.")
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    try:
        return _SCALINGS[kind](plain, theta, scaling, config)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error}, which rope scaling {kind!r} needs.") from error
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"config.json: rope scaling {kind!r} cannot be computed ({error}) from {scaling}.") from error


def angles(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """cos and sin, each [B, 1, T, head_dim / 2] float32, for positions [B, T]."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)[None, None, None]
    phase = positions[:, None, :, None].astype(jnp.float32) * frequencies
    return materialised(jnp.cos(phase) * rope.magnitude), materialised(jnp.sin(phase) * rope.magnitude)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, H, T, D] rotated, its halves being the two coordinates (the Hugging Face layout)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def _make(frequencies: np.ndarray, magnitude: float = 1.0, max_positions: int | None = None) -> Rope:
    return Rope(tuple(float(value) for value in frequencies), magnitude, max_positions)


def _default(plain, theta, scaling, config) -> Rope:
    return _make(plain)


def _linear(plain, theta, scaling, config) -> Rope:
    return _make(plain / scaling["factor"])


def _dynamic(plain, theta, scaling, config) -> Rope:
    # Beyond the trained length this scaling re-bases every key by the length of the pass that reads it, so that K+1
    # tokens at once and one by one differ: speculation cannot be exact there. Up to that length it is plain rope.
    return _make(plain, max_positions=config["max_position_embeddings"])


def _llama3(plain, theta, scaling, config) -> Rope:
    """Llama 3.1's: long wavelengths are stretched by the factor, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return _make(plain * ((1 - share) / factor + share))


def _yarn(plain, theta, scaling, config) -> Rope:
    """YaRN, arXiv:2309.00071: a ramp over dimensions between interpolation and extrapolation, and a magnitude."""
    factor = scaling["factor"]
    trained = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
    size = 2 * len(plain)

    def dimension(turns: float) -> float:  # the dimension that makes this many turns over the trained length
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0, 1)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        if scaling.get("mscale") or scaling.get("mscale_all_dim"):
            raise ValueError("yarn with mscale is not supported; give attention_factor in the config instead.")
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return _make(plain * (ramp / factor + (1 - ramp)), float(magnitude))


_SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
