"""Rotary scalings, frequency by frequency, against transformers' own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specjax.models import rope

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": LLAMA3,
    "llama3-factor-32": {**LLAMA3, "factor": 32.0, "high_freq_factor": 2.0},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16, "beta_slow": 3},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
    "yarn-factor-1": {**YARN, "factor": 1.0},
    "yarn-nulls": {**YARN, "attention_factor": None, "beta_fast": None},
    "yarn-short": {**YARN, "original_max_position_embeddings": 5},  # even the slowest dimension turns once
    "yarn-one-dimension": {**YARN, "beta_fast": 1.0, "truncate": False},  # the ramp is a step
}


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_match_transformers(name):
    """Catches an end of the ramp off by one, a ramp turned round, a magnitude left out, and null read as a value."""
    config = {"max_position_embeddings": 131072, "rope_parameters": SCALINGS[name]}
    theirs = transformers.LlamaConfig(hidden_size=128, num_attention_heads=1, **_copy(config))
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](theirs, None)
    ours = rope.from_config(config, 128)
    np.testing.assert_allclose(ours.frequencies, frequencies.numpy(), rtol=2e-6)
    assert ours.magnitude == pytest.approx(magnitude)
    assert ours.max_positions is None


@pytest.mark.usefixtures("torch")
def test_original_length_defaults_to_the_models_own():
    """Catches yarn without original_max_position_embeddings stretched over the wrong length."""
    parameters = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    config = {"max_position_embeddings": 4096, "rope_parameters": parameters}
    theirs = transformers.LlamaConfig(hidden_size=128, num_attention_heads=1, **_copy(config))
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs, None)
    np.testing.assert_allclose(rope.from_config(config, 128).frequencies, frequencies.numpy(), rtol=2e-6)


def test_dynamic_scaling_limits_the_positions():
    """Catches speculation past the trained length, where this scaling depends on how the text is cut into passes."""
    config = {"max_position_embeddings": 48, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert rope.from_config(config, 8).max_positions == 48


def test_rotation_keeps_the_dtype_and_the_precision_of_far_positions():
    """Catches angles computed in the parameters' dtype: bfloat16 cannot tell position 1000 from 1001."""
    built = rope.from_config({}, 8)
    cos, sin = rope.angles(built, jnp.array([[1000, 1001]]))
    assert cos.dtype == sin.dtype == jnp.float32
    wanted = np.outer([1000, 1001], built.frequencies)
    np.testing.assert_allclose(cos[0, 0], np.cos(wanted), atol=1e-4)
    np.testing.assert_allclose(sin[0, 0], np.sin(wanted), atol=1e-4)
    assert rope.rotate(jnp.ones((1, 1, 2, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "'factor'"),
        ({"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "'low_freq_factor'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'max_position_embeddings'"),
        ({"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)
def test_refuses_what_it_cannot_rotate(config, culprit):
    """Catches a scaling that is passed over in silence, and a KeyError in place of a sentence."""
    with pytest.raises(ValueError, match=culprit):
        rope.from_config(config, 8)


def _copy(config: dict[str, Any]) -> dict[str, Any]:
    """transformers writes into the parameters that it is given."""
    return {**config, "rope_parameters": dict(config["rope_parameters"])}
