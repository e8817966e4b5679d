"""Checks the fields of a config.json before they are used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_MOST = 2**31 - 1  # JAX's shapes are int32


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _is_window(value: Any) -> bool:
    return value == 0 or _is_size(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf and float(value) < math.inf


_Rule = tuple[Callable[[Any], bool], str, tuple[str, ...]]
_RULES: tuple[_Rule, ...] = (
    (
        _is_size,
        f"a whole number in 1..{_MOST}",
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "n_embd", "n_layer", "n_head", "n_inner", "n_positions",
            "max_position_embeddings",
        ),
    ),
    (_is_window, f"a whole number in 0..{_MOST}", ("sliding_window", "max_window_layers")),
    (_is_positive, "a number above 0", ("rms_norm_eps", "layer_norm_epsilon", "rope_theta")),
    (lambda value: isinstance(value, str), "a name", ("model_type", "hidden_act", "activation_function")),
    (lambda value: isinstance(value, dict), "an object", ("rope_parameters", "rope_scaling")),
    (lambda value: isinstance(value, list), "a list", ("layer_types",)),
)  # fmt: skip


def check(config: dict[str, Any]) -> None:
    """Raises ValueError, naming the field, if a field that sets the model's shape has an invalid value.

    Fields that are missing or null are not checked here.

    >>> check({"hidden_size": "wide"})
    Traceback (most recent call last):
    ...
    ValueError: config.json: hidden_size must be a whole number in 1..2147483647, got 'wide': fetch the file again.
    """
    if not isinstance(config, dict):
        raise ValueError(f"config must be the contents of a config.json, a dict, got {type(config).__name__}.")
    for holds, wanted, names in _RULES:
        for name in names:
            value = config.get(name)
            if value is not None and not holds(value):
                raise ValueError(f"config.json: {name} must be {wanted}, got {value!r}: fetch the file again.")
