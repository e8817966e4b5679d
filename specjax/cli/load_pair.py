"""A target, its draft and their tokenizer, as the command line asks for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from specjax import text
from specjax.dtypes import floating
from specjax.logs import in_short

_log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """The models and the tokenizer that `load_pair` loaded."""

    target: Any  # models.Loaded
    draft: Any  # models.Loaded; None: plain decoding
    tokenizer: Any

    def stop_tokens(self) -> np.ndarray:
        """The target's end-of-text ids."""
        return self.target.stop_tokens


def load_pair(model: str | None, draft: str | None, tokenizer: str | None, dtype: str | None) -> Pair:
    """Loads the pair, by default the shipped one; float32 on CPU unless told otherwise.

    The tokenizer limits both vocabularies: ids past its last one are padding.

    Raises:
      ValueError: only one model of a pair, an unknown dtype, no tokenizer.
    """
    from specjax import models

    _refuse_empty(model, draft, tokenizer, dtype)
    if (model is None) != (draft is None):
        given, lacking = ("--model", "--draft") if draft is None else ("--draft", "--model")
        raise ValueError(
            f"{given} needs {lacking} beside it: a pair with one tokenizer (or neither, for the shipped one)."
        )
    chosen = _dtype(dtype)
    target = models.load(model or models.PRETRAINED / "target", dtype=chosen)
    drafting = models.load(draft or models.PRETRAINED / "draft", dtype=chosen)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) for loaded in (target, drafting)]
    if sizes[1] >= sizes[0]:
        _log.warning(
            "the draft has %s parameters, the target %s: speculation cannot pay. Are --model and --draft exchanged?",
            in_short(sizes[1]), in_short(sizes[0]),
        )  # fmt: skip
    return _fitted(Pair(target, drafting, _tokenizer(tokenizer, target)))


def load_target(model: str, tokenizer: str | None, dtype: str | None) -> Pair:
    """Loads a target that is to decode plainly, without a draft. Errors as for `load_pair`."""
    from specjax import models

    _refuse_empty(model, None, tokenizer, dtype)
    target = models.load(model, dtype=_dtype(dtype))
    return _fitted(Pair(target, None, _tokenizer(tokenizer, target)))


def in_int8(pair: Pair, parts: Sequence[str]) -> Pair:
    """The pair with its target, its draft or both in int8: `parts` names the fields."""
    from specjax import models

    return pair._replace(**{part: models.quantize(getattr(pair, part)) for part in parts})


def _refuse_empty(model: str | None, draft: str | None, tokenizer: str | None, dtype: str | None) -> None:
    for name, given in (("--model", model), ("--draft", draft), ("--tokenizer", tokenizer)):
        if given == "":
            raise ValueError(f"{name} is empty: give a folder, a file or a hub id, or leave the option out.")
        os.fsencode(given or "")  # raises for a name that the locale cannot encode: pathlib would call it missing
    if dtype == "":
        raise ValueError("--dtype is empty: give float32, bfloat16 or float16, or leave the option out.")


def _fitted(pair: Pair) -> Pair:
    """The pair with both vocabularies no larger than the tokenizer's."""

    def within(loaded: Any) -> Any:
        return loaded._replace(model=text.within_vocab(loaded.model, pair.tokenizer))

    return pair._replace(target=within(pair.target), draft=None if pair.draft is None else within(pair.draft))


def _dtype(name: str | None) -> Any:
    if name is None and jax.default_backend() == "cpu":
        name = "float32"
    return None if name is None else floating(name)


def _tokenizer(given: str | None, target: Any) -> Any:
    from specjax.models import llama2c

    path = Path(given) if given else target.path
    if path.suffix == ".bin":
        if not given:
            raise ValueError(f"{path} has no tokenizer in it: pass --tokenizer with its tokenizer .bin file.")
        return llama2c.load_tokenizer(path, target.config["vocab_size"])
    return text.load_tokenizer(path)
