"""Reading checkpoints: what is accepted, what is refused and in which words, and where tensors go."""

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
    assert kept.model is narrow.model  # one architecture, whatever the dtype


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


# Refused: the message names the culprit.


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
    [(name, patterns)] = asked
    assert name == "someone/tiny-llama"
    assert loaded.path == tiny_folder
    assert {"config.json", "*.safetensors", checkpoint.INDEX, "tokenizer.json"} <= set(patterns)
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
