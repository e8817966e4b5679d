"""Models by their shape alone: well-known sizes by name, or any config.json. No weights are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from specjax.sharding import Layout


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "tie_word_embeddings": tied, "rope_theta": 500000.0,
    }  # fmt: skip


# Llama 3's shapes. The smallest is no published model, but a plausible draft model for the 1B one.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-100m": _llama(768, 2048, 12, 12, 4, 64, tied=True),
    "llama-1b": _llama(2048, 8192, 16, 32, 8, 64, tied=True),
    "llama-3b": _llama(3072, 8192, 28, 24, 8, 128, tied=True),
    "llama-8b": _llama(4096, 14336, 32, 32, 8, 128, tied=False),
    "llama-70b": _llama(8192, 28672, 80, 64, 8, 128, tied=False),
}


class Shaped(NamedTuple):
    """A model without weights."""

    name: str
    built: Any  # models.Architecture
    layers: int
    heads: int  # query heads
    kv_heads: int
    config: dict[str, Any]

    def on(self, layout: Layout) -> Shaped:
        """The same model on a mesh."""
        from specjax import models

        return self._replace(built=models.build(self.config, layout=layout))

    def places(self) -> Any:
        """Where each parameter lies on its mesh; a tree of shardings."""
        from specjax import models

        return models.shardings(self.built)

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        from jax import tree

        return sum(leaf.size for leaf in tree.leaves(self.built.abstract))


def shaped(name_or_path: str, *, layers: int | None = None) -> Shaped:
    """The model that a name or a config.json stands for.

    Args:
      name_or_path: a key of CONFIGS ("llama-8b"), "target" or "draft" (the shipped pair), a folder with a config.json,
        such a file, or a hub id "owner/name" (its config.json alone is fetched).
      layers: as many layers instead of the config's; for experiments with smaller programs.

    Raises:
      ValueError: none of these, or an architecture that is not supported; the names that are known are listed.

    >>> shaped("llama-8b").layers
    32
    """
    from specjax import models

    config = read_config(name_or_path)
    if layers is not None:
        config = {**config, "num_hidden_layers": layers}
    built = models.build(config)
    read = models.FAMILIES[config["model_type"]].read_config(config)
    kv_heads = getattr(read, "num_kv_heads", read.num_heads)
    return Shaped(name_or_path, built, read.num_layers, read.num_heads, kv_heads, config)


def read_config(name_or_path: str) -> dict[str, Any]:
    """The contents of a config.json, or the equivalent for a known name; see `shaped`."""
    from specjax.models import PRETRAINED, checkpoint

    if name_or_path == "":
        raise ValueError("a model's name is empty: give a known shape, a folder, a config.json or a hub id.")
    os.fsencode(name_or_path)  # raises for a name that the locale cannot encode: pathlib would call it missing
    if name_or_path in CONFIGS:
        return CONFIGS[name_or_path]
    path = PRETRAINED / name_or_path if name_or_path in ("target", "draft") else Path(name_or_path)
    if path.is_file():
        return checkpoint.read_json(path)
    if path.is_dir():
        return checkpoint.read_config(path)
    return checkpoint.read_json(_fetch(name_or_path))


def _fetch(name: str) -> Path:
    known = f"a known shape ({', '.join(CONFIGS)}), target or draft (the shipped pair), a folder or a config.json"
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ValueError(f"{name} is neither {known}, nor a hub id of the form owner/name.")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:
        raise ValueError(
            f"{name} is not {known}, and its config.json could not be fetched from the hub ({type(error).__name__}: "
            f"{error}). Check the spelling and the network, or pass the path of a config.json."
        ) from error
