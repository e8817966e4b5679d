"""Checkpoint folders, ./my-model, in which something is wrong; those that are called load it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import tiny
from safetensors.numpy import load_file, save_file

from specjax import models


def changed(**changes):
    """A checkpoint in ./my-model with a few things changed in its config.json; None takes a field away."""
    loaded = models.random(tiny.config("llama"), jax.random.key(0))
    models.save(loaded, "my-model")
    config = {**loaded.config, **changes}
    kept = {name: value for name, value in config.items() if value is not None}
    Path("my-model/config.json").write_text(json.dumps(kept))
    return "my-model"


def with_tensors(change):
    folder = changed()
    tensors = load_file(f"{folder}/model.safetensors")
    change(tensors)
    save_file(tensors, f"{folder}/model.safetensors")
    models.load(folder)


def no_folder_of_weights():
    Path("my-model").mkdir()
    Path("my-model/config.json").write_text(json.dumps(tiny.config("llama")))
    models.load("my-model")


def cut_off():
    folder = changed()
    file = Path(folder, "model.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    models.load(folder)


def shard_missing():
    folder = changed()
    Path(folder, "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    models.load(folder)


def llama2c():
    Path("my-model").mkdir()
    header, count = (8, 4, 1, 2, 2, 11, 16), 11 * 8 + 2 * 8 + 4 * 8 * 8 + 3 * 4 * 8 + 8 + 16 * 4
    Path("my-model/stories.bin").write_bytes(struct.pack("<7i", *header) + bytes(4 * count))
    models.load("my-model")
