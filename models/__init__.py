"""Model families in Flax NNX, and the loader of Hugging Face checkpoints. Imported as `specjax.models`."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

if __name__ != "specjax.models":
    # A second copy under another name would define every pytree class twice, and nothing would fit together.
    raise ImportError(f"import this package as specjax.models, not as {__name__}.")

from specjax.dtypes import floating
from specjax.models import checkpoint, fields, gpt2, int8, llama, llama2c
from specjax.models.checkpoint import Loaded, save
from specjax.models.family import Architecture, init, shardings
from specjax.models.int8 import INT8
from specjax.models.layers import PLAIN, Kinds
from specjax.sharding import Layout, Rules
from specjax.types import PyTree

FAMILIES = {kind: family for family in (llama, gpt2) for kind in family.MODEL_TYPES}
_log = logging.getLogger(__name__)
PRETRAINED = Path(__file__).resolve().parent / "pretrained"  # the shipped pair: target and draft


def build(
    config: dict[str, Any],
    *,
    vocab_size: int | None = None,
    layout: Layout | None = None,
    rules: Rules | None = None,
    kinds: Kinds = PLAIN,
) -> Architecture:
    """The architecture that a config.json describes.

    Args:
      config: contents of a Hugging Face config.json.
      vocab_size: ids that may be emitted, where the vocabulary is padded; default all.
      layout: where the model lies on a mesh, from `specjax.sharding.layout(mesh)`.
      rules: how parameters are cut over it, by path; default the family's own.
      kinds: the layers that hold matrices, `models.INT8` for example.

    Raises:
      ValueError: an architecture or an option that is not supported, by name.

    >>> tiny = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16,
    ...         "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> build(tiny).model.vocab_size
    16
    """
    fields.check(config)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(_unknown(config))
    read = FAMILIES[kind].read_config(config)
    built = FAMILIES[kind].build(read, min(vocab_size or read.vocab_size, read.vocab_size), layout, kinds)
    return built if rules is None else built._replace(rules=rules)


def _unknown(config: dict[str, Any]) -> str:
    said = f"unknown model_type {config.get('model_type')!r} (architectures: {config.get('architectures')})"
    known = ", ".join(FAMILIES)
    if config.get("is_encoder_decoder") or {"encoder", "decoder"} <= config.keys():
        return f"{said}: encoder-decoders are not supported yet. Decoders are: {known}, and your own Flax modules."
    return (
        f"{said}; known: {known}. If you have it as a Flax module, specjax.adapters.from_nnx or from_linen makes a "
        "model of it."
    )


def random(
    config: dict[str, Any],
    key: jax.Array,
    dtype: Any = jnp.float32,
    *,
    layout: Layout | None = None,
    rules: Rules | None = None,
) -> Loaded:
    """A model of this config with random parameters; `layout` and `rules` as for `build`."""
    built = build(config, layout=layout, rules=rules)
    return checkpoint.with_stop_tokens(Loaded(built.model, init(built, key, floating(dtype)), config, None))


def quantize(loaded: Loaded, *, rules: Rules | None = None) -> Loaded:
    """The same model with its matrices in int8, one scale for each output: a target of its own, or a cheaper drafter.

    Norms and biases keep their dtype, which activations and caches have too. The quantised model has another
    distribution than the original; speculation follows the distribution of the quantised model exactly. It cannot be
    saved: keep the checkpoint. It helps on accelerators, which read int8 weights directly. On CPU XLA widens the
    weights before the loop, and nothing is gained.

    Args:
      loaded: from `load` or `random`; with a layout, the result lies on the same mesh.
      rules: how parameters are cut over the mesh; default the family's own.

    >>> draft = load(PRETRAINED / "draft")
    >>> small = quantize(draft)
    >>> [sum(leaf.nbytes for leaf in jax.tree.leaves(each.params)) // 1000 for each in (draft, small)]
    [3147, 1589]
    """
    checkpoint.check_loaded(loaded)
    model = loaded.model
    built = build(loaded.config, vocab_size=model.vocab_size, layout=model.layout, rules=rules, kinds=INT8)
    config = {**loaded.config, "quantization_config": {"quant_method": "specjax-int8"}}
    rounded = loaded._replace(
        model=built.model._replace(stop_tokens=model.stop_tokens),
        params=int8.rounded_params(built, loaded.params),
        config=config,
    )
    _log.info("quantised %s: now %s", checkpoint.describe(loaded), checkpoint.describe(rounded))
    return rounded


def load(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    layout: Layout | None = None,
    rules: Rules | None = None,
) -> Loaded:
    """Reads a model: a Hugging Face folder, a llama2.c `.bin` file, or a hub id (fetched where there is a network).

    Tensors go one at a time straight to the device(s): the memory peak is the parameters plus one tensor. On a mesh of
    several processes each reads its own devices' parts of the files, and nothing else.

    Args:
      path_or_hub_id: a folder with config.json and safetensors (single or sharded), a file, or "owner/name".
      dtype: of the parameters, for example jnp.bfloat16; None keeps what is stored.
      layout: where the model lies on a mesh, from `specjax.sharding.layout(mesh)`; None is the default device.
      rules: how parameters are cut over it, by path; default the family's own (`specjax.models.llama.RULES`, say).

    Raises:
      ValueError: an unknown architecture or dtype, a missing, extra or misshapen tensor, a damaged file; named.
      FileNotFoundError: no such path, and no hub to ask.

    >>> loaded = load(PRETRAINED / "draft")
    >>> loaded.config["num_hidden_layers"]
    2
    """
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise ValueError(
            "path_or_hub_id must be a string or a path, as in 'my-model' or 'owner/name', got "
            f"{type(path_or_hub_id).__name__}."
        )
    dtype = None if dtype is None else floating(dtype)
    path = Path(path_or_hub_id)
    is_llama2c = path.is_file() and path.suffix == ".bin"
    source = path if is_llama2c or path.is_dir() else _fetch(path_or_hub_id)
    began = time.perf_counter()
    loaded = checkpoint.with_stop_tokens((llama2c.load if is_llama2c else _load_folder)(source, dtype, layout, rules))
    _log.info("loaded %s from %s in %.2f s", checkpoint.describe(loaded), source, time.perf_counter() - began)
    model = loaded.model
    _log.debug("ids below %d may be emitted; at most %s positions", model.vocab_size, model.max_positions or "any")
    return loaded


def _load_folder(folder: Path, dtype: Any, layout: Layout | None, rules: Rules | None) -> Loaded:
    if not (folder / "config.json").is_file():
        files = [file for file in sorted(folder.glob("*.bin")) if llama2c.is_model(file)]
        if files:
            raise ValueError(f"{folder} has no config.json, but a llama2.c file: load that, {files[0]}.")
    config = checkpoint.read_config(folder)
    built = build(config, vocab_size=_tokenizer_size(folder), layout=layout, rules=rules)
    return Loaded(built.model, checkpoint.read_params(folder, built, dtype), config, folder)


def _tokenizer_size(folder: Path) -> int | None:
    """One more than the largest id of the folder's tokenizer: the ids past it are padding."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = checkpoint.read_json(path)
    vocab = content.get("model", {}).get("vocab", {})
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return max(ids) + 1 if ids else None


def _fetch(path_or_hub_id: str | os.PathLike[str]) -> Path:
    name = os.fspath(path_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise FileNotFoundError(f"{name} is neither a folder, nor a .bin file, nor a hub id of the form owner/name.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("fetching from the hub needs huggingface_hub: pip install 'specjax[hf]'.") from error
    _log.info("fetching %s from the hub", name)

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:
            raise FileNotFoundError(
                f"{name} is no folder here and could not be fetched from the hub ({type(error).__name__}: {error}). "
                "Check the spelling and the network, or pass the path of a downloaded folder."
            ) from error

    about = ["config.json", checkpoint.INDEX, *checkpoint.TOKENIZER_FILES]
    folder = fetch(about)
    # By their names: repositories also hold adapters, and the same weights in other forms.
    weights = checkpoint.index_of(folder) if (folder / checkpoint.INDEX).is_file() else [checkpoint.SINGLE]
    return fetch([*about, *weights])


__all__ = [
    "FAMILIES",
    "INT8",
    "PRETRAINED",
    "Architecture",
    "Loaded",
    "PyTree",
    "build",
    "init",
    "load",
    "quantize",
    "random",
    "save",
    "shardings",
]
