"""The package itself: its one name, models without a checkpoint, architectures shared by equal configs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from specjax import models

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def test_the_folder_cannot_be_imported_under_its_own_name():
    """Catches a second copy of every class, which would fit nothing that specjax.models made."""
    ran = subprocess.run([sys.executable, "-c", "import models"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "ImportError: import this package as specjax.models, not as models." in ran.stderr


def test_random_parameters_follow_key_and_dtype():
    """Catches parameters that ignore the key, or a dtype that reaches only some of them."""
    one, same, other = (models.random(TINY, jax.random.key(seed)) for seed in (0, 0, 1))
    narrow = models.random(TINY, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one.params, same.params))
    assert not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one.params, other.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(one.params)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype(jnp.bfloat16)}
    assert one.path is None


def test_equal_configs_share_one_model():
    """Catches a program compiled again for each checkpoint of the same shape: jit knows a Model by identity."""
    again = {**TINY, "num_key_value_heads": 2, "rope_theta": 10000.0, "bos_token_id": 5}
    assert models.build(TINY).model is models.build(again).model
    assert models.build(TINY).model is not models.build({**TINY, "rope_theta": 500.0}).model
    assert models.build(TINY, vocab_size=12).model.vocab_size == 12
    assert models.build(TINY, vocab_size=99).model.vocab_size == 16


def test_positions_are_limited_where_the_architecture_limits_them():
    """Catches a table of positions read past its end, and a limit put on a rotation that needs none."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12}
    assert models.build(gpt2).model.max_positions == 12
    assert models.build({**TINY, "max_position_embeddings": 12}).model.max_positions is None
    assert models.build({**TINY, "max_position_embeddings": 12,
                         "rope_scaling": {"type": "dynamic", "factor": 2.0}}).model.max_positions == 12  # fmt: skip


@pytest.mark.parametrize("kind", models.FAMILIES)
def test_every_family_refuses_a_config_without_its_sizes(kind):
    """Catches a KeyError in place of a sentence that names the fields."""
    with pytest.raises(ValueError, match=f"config.json of a {kind} model lacks vocab_size, "):
        models.build({"model_type": kind})
