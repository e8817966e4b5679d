"""Hugging Face checkpoint folders, read and written without PyTorch: config.json and safetensors."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.logs import in_short
from specjax.models.family import Architecture, assemble, tensor_name
from specjax.types import Model, PyTree

SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", GENERATION,
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model ready to use: `specjax.generate(loaded.model, loaded.params, ...)`."""

    model: Model
    params: PyTree
    config: dict[str, Any]  # the contents of config.json
    path: Path | None  # where it came from

    @property
    def stop_tokens(self) -> np.ndarray:
        """[n] int32: the ids that end a text, by config.json and generation_config.json."""
        return np.array(self.model.stop_tokens, np.int32)


def check_loaded(loaded: Any) -> None:
    """Raises ValueError if `loaded` is not a Loaded."""
    if not isinstance(loaded, Loaded):
        raise ValueError(f"loaded must be what models.load or models.random returned, got {type(loaded).__name__}.")


def describe(loaded: Loaded) -> str:
    """Family, parameters, dtypes and bytes, for a log."""
    leaves = jax.tree.leaves(loaded.params)
    count, size = (sum(sizes) for sizes in zip(*((leaf.size, leaf.nbytes) for leaf in leaves), strict=True))
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    return f"{loaded.config['model_type']}, {in_short(count)} parameters, {dtypes}, {size / 1e6:.4g} MB"


class _Tensor(NamedTuple):
    """One stored tensor; `read` takes a tuple of slices."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json, or a ValueError that says what is wrong with the folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: a Hugging Face model folder is expected.")
    return read_json(path)


def with_stop_tokens(loaded: Loaded) -> Loaded:
    """The same with the stop tokens of its config.json and of the generation_config.json beside it, where there is one.

    Ids that the model cannot emit are left out. Raises ValueError where `eos_token_id` holds no ids.
    """
    path = None if loaded.path is None else loaded.path / GENERATION
    found = _end_ids(loaded.config, "config.json")
    if path is not None and path.is_file():
        found += _end_ids(read_json(path), str(path))
    size = loaded.model.vocab_size
    valid = [end for end in dict.fromkeys(found) if 0 <= end < size]
    if len(valid) < len(set(found)):
        beyond = sorted(set(found) - set(valid))
        _log.warning("eos_token_id %s cannot be emitted, as ids are 0..%d: left out", beyond, size - 1)
    return loaded._replace(model=loaded.model._replace(stop_tokens=tuple(valid)))


def _end_ids(content: dict[str, Any], file: str) -> list[int]:
    end = content.get("eos_token_id")
    ids = end if isinstance(end, list) else [] if end is None else [end]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
        raise ValueError(
            f"{file}: eos_token_id must be an integer, a list of integers or null, got {end!r}: correct it."
        )
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a ValueError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not an object: fetch the file again.")
    return content


def read_params(folder: Path, built: Architecture, dtype: Any) -> PyTree:
    """Every tensor of the folder, one at a time, straight into (sharded) device arrays of `dtype` (None: as stored)."""
    tensors = _open_tensors(folder)
    source = match_names(set(tensors), built, folder)
    leaves = jax.tree_util.tree_leaves_with_path(built.abstract)
    shapes = {tensor_name(path): leaf.shape for path, leaf in leaves}
    wrong = [
        f"{name}: expected {shapes[name]}, got {tensors[stored].shape}"
        for name, stored in source.items()
        if shapes[name] != tensors[stored].shape
    ]
    if wrong:
        raise ValueError(f"{folder}: tensors do not have the shapes that config.json asks for: {_some(wrong)}.")
    _check_tied(folder, tensors, built, source)

    return assemble(built, lambda name, place: _to_device(tensors[source[name]], dtype, place))


def match_names(stored: set[str], built: Architecture, folder: Path) -> dict[str, str]:
    """The stored name of each parameter. Raises ValueError with the names that are missing or not known."""
    wanted = {tensor_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(built.abstract)}
    source, extra = {}, []
    for name in sorted(stored):
        if name in wanted:
            source[name] = name
        elif built.prefix + name in wanted:  # a checkpoint of the bare base model
            source[built.prefix + name] = name
        elif not name.endswith(built.ignored) and not (built.tied and name == built.tied[0]):
            extra.append(name)
    if built.tied and built.tied[0] in stored:
        source.setdefault(built.tied[1], built.tied[0])  # some checkpoints hold only the output layer of the two
    missing = sorted(wanted - source.keys())
    if missing or extra:
        said = [f"missing: {_some(missing)}"] * bool(missing) + [f"not known: {_some(extra)}"] * bool(extra)
        raise ValueError(
            f"{folder}: the tensors do not fit config.json. {'; '.join(said)}. Is it the config of these weights?"
        )
    return source


def save(loaded: Loaded, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a Hugging Face folder that `load` and transformers read: config, safetensors, tokenizer files.

    Tensors are written as they are, so a checkpoint loaded without `dtype` comes back byte for byte. Everything goes
    to a temporary folder that is renamed at the end: a failure leaves nothing half-written.

    Raises:
      FileExistsError: `folder` exists and is not empty.
      ValueError: the model is quantised.
    """
    check_loaded(loaded)
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(loaded.params)):
        raise ValueError(
            "a quantised model is no Hugging Face checkpoint and cannot be saved: save what it was made of, and call "
            "models.quantize after loading."
        )
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder: choose another or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    began = time.perf_counter()
    try:
        _write(loaded, partial, max_shard_bytes)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _log.info("saved %s to %s in %.2f s", describe(loaded), target, time.perf_counter() - began)


def _write(loaded: Loaded, folder: Path, max_shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_leaves_with_path(loaded.params)
    sizes = {tensor_name(path): leaf.nbytes for path, leaf in leaves}
    arrays = {tensor_name(path): leaf for path, leaf in leaves}
    shards = list(_shards(sizes, max_shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        save_file({name: np.asarray(arrays[name]) for name in shard}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = {**loaded.config, "dtype": str(leaves[0][1].dtype)}
    config.pop("torch_dtype", None)  # the older name of the same field
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in TOKENIZER_FILES:
        if loaded.path is not None and (loaded.path / file).is_file():
            shutil.copyfile(loaded.path / file, folder / file)


def _shards(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if shard and filled + size > most:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _open_tensors(folder: Path) -> dict[str, _Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading checkpoints needs safetensors: pip install 'specjax[hf]'.") from error

    tensors: dict[str, _Tensor] = {}
    for file in _weight_files(folder):
        try:
            handle = safe_open(folder / file, framework="np")
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is no readable safetensors file ({error}): fetch it again.") from error
        for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
            stored = handle.get_slice(name)
            tensors[name] = _Tensor(tuple(stored.get_shape()), lambda at, stored=stored: stored[at])
    return tensors


def index_of(folder: Path) -> list[str]:
    """The files of weights that the folder's index names."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map: fetch the file again.")
    return sorted(set(weight_map.values()))


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        files = index_of(folder)
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {_some(absent)}, named in {INDEX}: fetch the missing shards.")
        return files
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise ValueError(
        f"{folder} has neither {SINGLE} nor {INDEX}. Convert other formats (pytorch_model.bin) "
        "with transformers: model.save_pretrained(folder)."
    )


def _to_device(tensor: _Tensor, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    def piece(at: tuple[slice, ...]) -> np.ndarray:
        host = tensor.read(at)
        return host if dtype is None else host.astype(jnp.dtype(dtype))

    if sharding is None:
        return jnp.asarray(piece(tuple(slice(None) for _ in tensor.shape)))
    return jax.make_array_from_callback(tensor.shape, sharding, piece)


def _check_tied(folder: Path, tensors: dict[str, _Tensor], built: Architecture, source: dict[str, str]) -> None:
    """If a tied output layer is stored nevertheless, it must equal the embedding."""
    if built.tied is None or built.tied[0] not in tensors:
        return
    whole = (slice(None), slice(None))
    output, embedding = (tensors[name].read(whole) for name in (built.tied[0], source[built.tied[1]]))
    if not np.array_equal(output, embedding):
        raise ValueError(
            f"{folder}: config.json ties {built.tied[0]} to {built.tied[1]}, but the stored tensors differ. "
            "Set tie_word_embeddings to false in config.json if the output layer has weights of its own."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
