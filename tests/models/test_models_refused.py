"""Checkpoints that are refused: the message names the culprit."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specjax import models
from specjax.models import checkpoint

WEIGHTS = checkpoint.SINGLE


def _without(name):
    return lambda tensors: tensors.pop(name)


def _with(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (_without("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up_proj.weight"),
        (_without("lm_head.weight"), "missing: lm_head.weight"),
        (_with("model.layers.2.mlp.up_proj.weight", np.ones(3)), "not known: model.layers.2.mlp.up_proj.weight"),
        (_with("model.layers.0.self_attn.q_proj.bias", np.ones(32)), "not known: .*q_proj.bias"),
        (_with("model.norm.weight", np.ones(31)), r"model.norm.weight: expected \(32,\), got \(31,\)"),
        (
            lambda tensors: tensors.update({f"other.{index}": np.ones(1) for index in range(9)}),
            "not known: other.0, other.1, other.2, other.3, other.4 and 4 more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny_copy, damage, culprit):
    """Catches a missing tensor left random, an extra one passed over, and a misshapen one that happens to broadcast."""
    tensors = load_file(tiny_copy / WEIGHTS)
    damage(tensors)
    save_file(tensors, tiny_copy / WEIGHTS)
    with pytest.raises(ValueError, match=culprit):
        models.load(tiny_copy)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "'mamba'.*MambaForCausalLM.*known: llama"),
        ({"model_type": None}, "unknown model_type None"),
        ({"rope_parameters": {"rope_type": "helix"}}, "unknown rope scaling 'helix'; known: default"),
        ({"hidden_act": "swoosh"}, "unknown hidden_act 'swoosh'; known: silu"),
        ({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "activation_function": "tanh"},
         "unknown activation_function 'tanh'"),
        ({"model_type": "gpt2", "n_embd": 8}, "gpt2 model lacks n_layer, n_head"),
        ({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "scale_attn_weights": False},
         "scale_attn_weights"),
        ({"hidden_size": None, "num_attention_heads": None}, "llama model lacks hidden_size, num_attention_heads"),
    ],
)  # fmt: skip
def test_config_that_is_not_supported_is_named(tiny_copy, edit_config, changes, culprit):
    """Catches an option that is passed over, and a KeyError in place of a sentence."""
    edit_config(tiny_copy, **changes)
    with pytest.raises(ValueError, match=culprit):
        models.load(tiny_copy)


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.999])
def test_truncated_weights_are_named(tiny_copy, kept):
    """Catches a download that broke off being read as far as it goes, or failing without a file name."""
    path = tiny_copy / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is no readable safetensors file \("):
        models.load(tiny_copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", checkpoint.INDEX])
@pytest.mark.parametrize(
    ("content", "culprit"),
    [(b'{"model_type": "lla', "is not valid JSON"), (b"\xff\xfe\x00", "is not valid JSON"), (b"[1, 2]", "holds list")],
)
def test_damaged_json_is_named(tiny_copy, name, content, culprit):
    """Catches a JSON error that does not say which file it comes from."""
    (tiny_copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {culprit}"):
        models.load(tiny_copy)


def test_index_without_a_weight_map_is_named(tiny_copy):
    """Catches an index of another format giving a KeyError."""
    (tiny_copy / checkpoint.INDEX).write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=f"{checkpoint.INDEX} has no weight_map"):
        models.load(tiny_copy)


def test_missing_shard_is_named(tiny_folder, tmp_path):
    """Catches a half-fetched checkpoint reported tensor by tensor instead of by file."""
    folder = tmp_path / "sharded"
    models.save(models.load(tiny_folder), folder, max_shard_bytes=9000)
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, named in {checkpoint.INDEX}"):
        models.load(folder)


def test_damaged_shard_is_named(tiny_folder, tmp_path):
    """Catches an error that leaves one to guess which of many shards is broken."""
    folder = tmp_path / "sharded"
    models.save(models.load(tiny_folder), folder, max_shard_bytes=9000)
    shard = max(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} is no readable safetensors file"):
        models.load(folder)


def test_folder_without_weights_or_config_says_what_is_missing(tiny_copy, tmp_path):
    """Catches a folder of pytorch_model.bin, or an empty one, ending in a stack trace from a library."""
    (tiny_copy / WEIGHTS).rename(tiny_copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{tiny_copy} has neither {WEIGHTS} nor {checkpoint.INDEX}"):
        models.load(tiny_copy)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=f"{empty} has no config.json"):
        models.load(empty)
