"""Reading checkpoints: what is accepted, where tensors go, paths and hub ids. Refusals: test_models_refused.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel

import specjax
from specjax import models, sharding
from specjax.models import checkpoint, family

WEIGHTS = checkpoint.SINGLE
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 12), np.int32)


# Accepted.


def test_dtype_converts_every_tensor(tiny_folder):
    """Catches a tensor that is left as stored: its first product with the others would widen or fail."""
    kept, narrow = models.load(tiny_folder), models.load(tiny_folder, dtype=jnp.bfloat16)
    for stored, converted in zip(jax.tree.leaves(kept.params), jax.tree.leaves(narrow.params), strict=True):
        assert stored.dtype == jnp.float32
        assert converted.dtype == jnp.bfloat16
        np.testing.assert_array_equal(stored.astype(jnp.bfloat16), converted)
    assert kept.model == narrow.model  # one architecture, whatever the dtype


def test_rules_see_every_name_and_shape(tiny_folder, raw_tensors, monkeypatch):
    """Catches a rule asked about other names than the checkpoint's, and an answer that is not followed."""
    layout, seen = sharding.layout(sharding.make_mesh(model=2)), {}
    place = sharding.param_sharding

    def watched(given, rules, name, shape):
        seen[name] = shape
        return place(given, rules, name, shape)

    monkeypatch.setattr(family, "param_sharding", watched)
    loaded = models.load(tiny_folder, layout=layout, rules=[(r"up_proj", ("width",))], dtype=jnp.bfloat16)
    assert seen == {name: tensor.shape for name, tensor in raw_tensors(tiny_folder).items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params):
        is_cut = "up_proj" in family.tensor_name(path)
        assert leaf.sharding.is_fully_replicated != is_cut
        assert leaf.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "stored", [("model.embed_tokens.weight", "lm_head.weight"), ("lm_head.weight",), ("model.embed_tokens.weight",)]
)
def test_tied_output_layer_may_be_stored_under_either_name(tiny_copy, edit_config, our_logits, stored):
    """Catches a tied checkpoint refused for its redundant tensor, or for holding only the output layer."""
    tensors = load_file(tiny_copy / WEIGHTS)
    embedding = tensors["model.embed_tokens.weight"]
    tensors = {name: value for name, value in tensors.items() if value.shape != embedding.shape}
    save_file({**tensors, **dict.fromkeys(stored, embedding)}, tiny_copy / WEIGHTS)
    edit_config(tiny_copy, tie_word_embeddings=True)
    loaded = models.load(tiny_copy)
    assert "lm_head" not in loaded.params
    np.testing.assert_array_equal(loaded.params["model"]["embed_tokens"]["weight"][...], embedding)
    assert np.isfinite(our_logits(loaded, TOKENS)).all()


def test_tied_output_layer_that_differs_is_refused(tiny_copy, edit_config):
    """Catches an output layer with weights of its own thrown away in silence."""
    edit_config(tiny_copy, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"ties lm_head.weight to model.embed_tokens.weight, but the stored"):
        models.load(tiny_copy)


@pytest.mark.parametrize(
    ("model_type", "options", "prefix", "leftover"),
    [
        ("gpt2", {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}, "transformer.",
         "h.0.attn.bias"),
        ("llama", {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
                   "num_attention_heads": 2, "tie_word_embeddings": True}, "model.",
         "layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)  # fmt: skip
def test_checkpoint_of_the_bare_base_model(make_reference, our_logits, tmp_path, model_type, options, prefix, leftover):
    """Catches checkpoints saved from the base model (GPT-2's own are) and the buffers in old ones being refused."""
    make_reference(model_type, **options).save_pretrained(tmp_path)
    wanted = our_logits(models.load(tmp_path), TOKENS)
    tensors = {name.removeprefix(prefix): value for name, value in load_file(tmp_path / WEIGHTS).items()}
    save_file({**tensors, leftover: np.ones((4,), np.float32)}, tmp_path / WEIGHTS)
    assert (our_logits(models.load(tmp_path), TOKENS) == wanted).all()


def test_fields_left_out_of_the_config_mean_what_transformers_means(tmp_path, make_reference, edit_config):
    """Catches a default that differs from the config class: a hub checkpoint may leave out what equals it."""
    options = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        make_reference(kind, num_hidden_layers=1, num_key_value_heads=2, head_dim=8, **options).save_pretrained(
            tmp_path
        )
        needed = {*options, "model_type", "num_hidden_layers"}
        full = json.loads((tmp_path / "config.json").read_text())
        wanted = models.llama.read_config({**full, **_CLASS_DEFAULTS[kind]})
        bare = {name: value for name, value in full.items() if name in needed}
        assert models.llama.read_config(bare) == wanted, kind
    bare = {**options, "num_hidden_layers": 30}
    qwen2 = models.llama.read_config({**bare, "model_type": "qwen2", "use_sliding_window": True})
    assert qwen2.windows == (None,) * 28 + (4096,) * 2
    assert models.llama.read_config({**bare, "model_type": "mistral"}).windows == (4096,) * 30
    null = {**bare, "model_type": "mistral", "sliding_window": None}
    assert models.llama.read_config(null).windows == (None,) * 30


_CLASS_DEFAULTS = {  # of the transformers classes, for the fields that the configs above had to set
    "llama": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 8, "head_dim": 8},
    "qwen2": {"num_key_value_heads": 32, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_null_key_value_heads_mean_one_for_each_query_head(kind):
    """Catches null read as the class's default number."""
    raw = {
        "model_type": kind, "vocab_size": 61, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 6, "num_key_value_heads": None, "head_dim": None,
    }  # fmt: skip
    read = models.llama.read_config(raw)
    assert (read.num_kv_heads, read.head_dim) == (6, 4)


# Padded vocabularies.


@pytest.fixture
def padded_folder(tiny_copy) -> Path:
    """A model of 61 columns with a tokenizer of 50 ids, whose padding columns hold the largest logit at every place."""
    tensors = load_file(tiny_copy / WEIGHTS)
    tensors["lm_head.weight"][50] = 100 * tensors["lm_head.weight"][3]
    tensors["lm_head.weight"][60] = -tensors["lm_head.weight"][50]  # one of the two wins, whatever the sign
    save_file(tensors, tiny_copy / WEIGHTS)
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(48)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<a>", "<b>"])
    tokenizer.save(str(tiny_copy / "tokenizer.json"))
    return tiny_copy


def test_padding_ids_are_never_emitted(padded_folder, quickly):
    """Catches a padding id that wins an argmax (row 0) or is drawn (row 1), from the target or from the draft."""
    padded = models.load(padded_folder)
    assert padded.model.vocab_size == 50
    (padded_folder / "tokenizer.json").unlink()
    unpadded = models.load(padded_folder)  # nothing says any more that the last columns are padding
    assert unpadded.model.vocab_size == 61
    options = {"max_new_tokens": 16, "sampling": specjax.Sampling(temperature=jnp.array([0.0, 1.0]))}
    prompts = jnp.array([[1, 2], [3, 4]])
    drafter = specjax.drafters.draft_model(padded.model)

    def speculate(params):
        return specjax.generate(padded.model, params, drafter, params, prompts, **options)

    def plainly(params, model):
        return specjax.autoregressive(model, params, prompts, **options)

    fast = quickly(speculate)(padded.params).new_tokens()
    plain = quickly(plainly, static_argnums=1)(padded.params, padded.model).new_tokens()
    assert [len(row) for row in fast + plain] == [16] * 4
    assert max(max(row) for row in fast + plain) < 50
    free = quickly(plainly, static_argnums=1)(unpadded.params, unpadded.model).new_tokens()
    assert all({50, 60} & set(row) for row in free)


@pytest.mark.parametrize(
    ("tokenizer", "added", "size"),
    [
        (BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), [], 3),
        (BPE({"a": 0, "b": 7}, []), [], 8),  # the largest id counts, not how many there are
        (Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("c", -3.0)], 0), [], 4),
        (BPE({"a": 0, "b": 1}, []), ["<pad>", "<eos>"], 4),
        (BPE({f"{index}": index for index in range(90)}, []), [], 61),  # never more than there are columns
    ],
)
def test_vocabulary_ends_with_the_tokenizers_last_id(tiny_copy, tokenizer, added, size):
    """Catches added tokens cut off, a vocabulary with gaps counted instead of measured, and Unigram's list."""
    made = Tokenizer(tokenizer)
    made.add_special_tokens(added)
    made.save(str(tiny_copy / "tokenizer.json"))
    assert models.load(tiny_copy).model.vocab_size == size


# Paths and hub ids.


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such", "weights.bin", "gpt2", "a/b/c", "~/model"])
def test_path_that_is_nothing_is_named(monkeypatch, path):
    """Catches a mistyped path sent to the hub, and the hub's answer shown in place of the mistake."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _never)
    with pytest.raises(FileNotFoundError, match=f"{path} is neither a folder, nor a .bin file, nor a hub id"):
        models.load(path)


def test_hub_id_is_fetched(monkeypatch, tiny_folder):
    """Catches a fetch of more than is needed (PyTorch weights beside the safetensors) or of less (no tokenizer)."""
    asked = []

    def fetch(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = models.load("someone/tiny-llama")
    assert {name for name, _ in asked} == {"someone/tiny-llama"}
    assert loaded.path == tiny_folder
    patterns = asked[-1][1]
    assert {"config.json", checkpoint.SINGLE, checkpoint.INDEX, "tokenizer.json"} <= set(patterns)
    assert not any(pattern.endswith(".bin") for pattern in patterns)


def test_hub_id_that_cannot_be_fetched_is_named(monkeypatch):
    """Catches the library's own errors let through: a caller would have to know them all."""

    def fail(name, **options):
        raise ConnectionError("the wire is cut")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"someone/tiny-llama is no folder .*ConnectionError: the wire is cut"):
        models.load("someone/tiny-llama")


def test_local_folder_wins_over_a_hub_id(monkeypatch, tiny_folder, tmp_path):
    """Catches a folder of the form owner/name fetched from the hub all the same."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _never)
    shutil.copytree(tiny_folder, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert models.load("someone/tiny").config["hidden_size"] == 32


def _never(*args, **options):
    raise AssertionError("the hub was asked")
