"""Writing checkpoints: byte for byte, readable by transformers, all or nothing."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from specjax import models
from specjax.models import checkpoint

TOKENS = np.random.default_rng(0).integers(0, 61, (1, 12), np.int32)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_saved_tensors_are_byte_identical(raw_tensors, tmp_path, name):
    """Catches bfloat16 sent through float32 or float16, a transposed or renamed tensor, and lost tokenizer files."""
    source = models.PRETRAINED / name
    models.save(models.load(source), tmp_path / "saved")
    saved = tmp_path / "saved"
    assert raw_tensors(saved) == raw_tensors(source)
    assert {file.name for file in saved.iterdir()} == {file.name for file in source.iterdir()}
    assert json.loads((saved / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / file).read_bytes() == (source / file).read_bytes()


def test_sharded_save_is_byte_identical_and_reads_back(raw_tensors, tmp_path):
    """Catches a shard that is too large, a tensor in two shards or in none, and an index that does not say where."""
    source, saved = models.PRETRAINED / "draft", tmp_path / "saved"
    loaded = models.load(source)
    models.save(loaded, saved, max_shard_bytes=200_000)
    assert raw_tensors(saved) == raw_tensors(source)
    index = json.loads((saved / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(tensor.content) for tensor in raw_tensors(source).values())
    files = sorted(file.name for file in saved.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    sizes = []
    for file in files:
        tensors = safetensors.numpy.load_file(saved / file)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        sizes.append((sum(value.nbytes for value in tensors.values()), len(tensors)))
    assert all(size <= 200_000 or count == 1 for size, count in sizes)
    again = models.load(saved)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again.params, loaded.params))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 9000])
def test_transformers_reads_the_saved_folder(
    tiny_folder, our_logits, read_reference, reference_logits, tmp_path, max_shard_bytes
):
    """Catches a folder that only specjax can read: no format entry, wrong shard names, a config without its dtype."""
    loaded = models.load(tiny_folder)
    models.save(loaded, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    theirs = reference_logits(read_reference(tmp_path / "saved"), TOKENS[0])
    np.testing.assert_allclose(our_logits(loaded, TOKENS)[0], theirs, rtol=0, atol=1e-4)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert str(config.dtype) == "torch.float32"
    for file in (tmp_path / "saved").glob("*.safetensors"):  # transformers 4 refuses a file without this entry
        assert safetensors.safe_open(file, framework="np").metadata() == {"format": "pt"}


def test_transformers_reads_the_saved_tokenizer(tmp_path):
    """Catches tokenizer files left behind."""
    models.save(models.load(models.PRETRAINED / "draft"), tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"], skip_special_tokens=True) == "def f(x):"


def test_config_says_the_dtype_that_was_written(tiny_copy, edit_config, tmp_path):
    """Catches a converted model whose config still names the old dtype, under the new or the old name of the field."""
    edit_config(tiny_copy, drop=("dtype",), torch_dtype="float32")
    models.save(models.load(tiny_copy, dtype=jnp.bfloat16), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert models.load(tmp_path / "saved").config == config


def test_random_model_is_saved_and_read_back(our_logits, read_reference, reference_logits, tmp_path):
    """Catches a model that was never a folder (no path to copy a tokenizer from) failing to save."""
    config = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    loaded = models.random(config, jax.random.key(1))
    models.save(loaded, tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    assert again.model == loaded.model
    assert (our_logits(again, TOKENS) == our_logits(loaded, TOKENS)).all()
    theirs = reference_logits(read_reference(tmp_path / "saved"), TOKENS[0])
    np.testing.assert_allclose(our_logits(loaded, TOKENS)[0], theirs, rtol=0, atol=1e-4)


def test_empty_and_deep_folders_are_written_to(tiny_folder, tmp_path):
    """Catches a prepared empty folder refused, and parents that have to be made by hand."""
    loaded = models.load(tiny_folder)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "some" / "way" / "down"):
        models.save(loaded, folder)
        assert models.load(folder).config == loaded.config


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_save_refuses_to_overwrite(tiny_folder, tmp_path, kind):
    """Catches the only copy of a checkpoint overwritten, or mixed with another's shards."""
    target = tmp_path / "taken"
    if kind == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(FileExistsError, match=f"{target} exists and is not an empty folder"):
        models.save(models.load(tiny_folder), target)
    assert (target / "notes.txt" if kind == "folder" else target).read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_save_that_fails_leaves_nothing_behind(tiny_folder, tmp_path, monkeypatch, error):
    """Catches half a checkpoint left where a whole one is expected, or a hidden folder left to fill the disk."""
    loaded = models.load(tiny_folder)
    written = []
    real = safetensors.numpy.save_file

    def fail_on_the_second(tensors, file, **options):
        if written:
            raise error
        written.append(file)
        real(tensors, file, **options)

    monkeypatch.setattr(safetensors.numpy, "save_file", fail_on_the_second)
    with pytest.raises(type(error)):
        models.save(loaded, tmp_path / "saved", max_shard_bytes=9000)
    assert len(written) == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    models.save(loaded, tmp_path / "saved")  # and the next try is not in the way of the first
