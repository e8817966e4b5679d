"""Stores in folders: written by orbax, whole or not at all."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.drafters.sorted_texts import SortedTexts
from specjax.drafters.store import Store

_log = logging.getLogger(__name__)
_FORMAT = 1


def save_store(store: Store, folder: str | Path) -> None:
    """Writes the store into a folder, in place of the one that is there.

    The old one stays until the new one is whole: whoever is killed while saving has the old one.

    Raises:
      ValueError: what is given first is no Store.
      ImportError: orbax-checkpoint is not installed.
    """
    if not isinstance(store, Store):
        raise ValueError(f"save_store takes (store, folder), got a {type(store).__name__} first.")
    ocp = _orbax()
    arrays = {"tokens": np.asarray(store.texts.tokens), "order": np.asarray(store.texts.order)}
    about = {
        "format": _FORMAT, "depth": store.texts.depth, "count": int(store.texts.count), "tokenizer": store.tokenizer,
        "checks": {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()},
    }  # fmt: skip
    with _manager(ocp, folder) as manager:
        latest = manager.latest_step()
        parts = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        manager.save(0 if latest is None else latest + 1, args=parts)
        manager.wait_until_finished()


def load_store(folder: str | Path) -> Store:
    """The store that `save_store` wrote.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: it holds no store, one of another format, or a damaged one.
      ImportError: orbax-checkpoint is not installed.
    """
    ocp, folder = _orbax(), Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder: make a store by drafters.Store.build(...) and save_store(store, folder)."
        )
    try:
        with _manager(ocp, folder) as manager:
            latest = manager.latest_step()
            if latest is None:
                raise ValueError("it holds no finished store")
            parts = ocp.args.Composite(arrays=ocp.args.StandardRestore(), about=ocp.args.JsonRestore())
            found = manager.restore(latest, args=parts)
        return _checked(found.arrays, found.about)
    except (ValueError, KeyError, TypeError, OSError) as error:
        said = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{folder} is no store, or a damaged one ({said}): build it again.") from None


def _checked(arrays: dict[str, Any], about: dict[str, Any]) -> Store:
    if about["format"] != _FORMAT:
        raise ValueError(f"its format is {about['format']}, this version reads {_FORMAT}")
    whole = {name: np.asarray(arrays[name]) for name in ("tokens", "order")}
    for name, array in whole.items():
        if zlib.crc32(array.tobytes()) != about["checks"][name]:
            raise ValueError(f"its {name} are not those that were written")
    tokens, order = (jnp.asarray(whole[name]) for name in ("tokens", "order"))
    texts = SortedTexts(tokens, order, jnp.int32(about["count"]), int(about["depth"]))
    return Store(texts, str(about["tokenizer"]))


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError("stores are saved by orbax-checkpoint: pip install 'specjax[train]'.") from error
    logging.getLogger("absl").setLevel(logging.WARNING)  # a line for each of a dozen steps of a save
    return ocp


def _manager(ocp: Any, folder: str | Path) -> Any:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(Path(folder).expanduser().absolute(), options=options)
