"""Strings in, strings out: tokenizers, padded prompts, and streamed text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from specjax import integers
from specjax.decode import parts
from specjax.decode.api import generate
from specjax.decode.stream import Chunk, stream, warn_of_troubles
from specjax.detokenize import pieces as detokenize
from specjax.detokenize.printer import Piece, Printer
from specjax.detokenize.stop_strings import stop_strings
from specjax.traced import refuse_traced
from specjax.types import Drafter, Model, PyTree
from specjax.viewer import trace
from specjax.viewer.trace import Trace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUCKET = 32
_MOST_BUCKET = 2**20  # 4 MB a row
_OF_TOKENIZERS = ("encode", "decode", "get_vocab", "get_vocab_size", "id_to_token")
_ROUNDS_PER_DISPATCH = 4  # stop strings are found after a dispatch: this many rounds may be wasted at the end
_OF_GENERATE = frozenset({"pad_token", "rounds_per_test"})  # options without a meaning where text is streamed


class Prompts(NamedTuple):
    """Right-padded prompts, as `generate` takes them."""

    tokens: np.ndarray  # [B, P] int32
    lengths: np.ndarray  # [B] int32

    def ids(self) -> list[list[int]]:
        """The ids of each prompt, without padding."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (its tokenizer.json).

    Padding and truncation, which some of these files switch on for training, are switched off: a prompt is all of its
    ids and no others.

    Raises:
      FileNotFoundError: no tokenizer.json there.
      ValueError: the file is no tokenizer.
      ImportError: the extra `hf` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text needs the tokenizers package: pip install 'specjax[hf]'.") from error
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be a string or a path, that of a tokenizer.json, got {type(path).__name__}.")
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path} does not exist: give a folder with a tokenizer.json, or that file.")
        raise FileNotFoundError(
            f"{file} does not exist. Folders without a tokenizer.json can be converted with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer that can be read ({error}): fetch the file again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the tokenizer's largest id: ids from there on have no text."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def within_vocab(model: Model, tokenizer: Tokenizer) -> Model:
    """The Model limited to the tokenizer's ids, stop tokens included: the vocabulary may be padded for the hardware."""
    size = _known(model.vocab_size, tokenizer)
    return model._replace(vocab_size=size, stop_tokens=tuple(token for token in model.stop_tokens if token < size))


def _known(size: int, tokenizer: Tokenizer) -> int:
    """How many of the ids below `size` the tokenizer can have."""
    if tokenizer.get_vocab_size(with_added_tokens=True) >= size:  # avoids the whole list in most calls
        return size
    return min(size, vocab_size(tokenizer))


def pad_prompts(prompts: Sequence[Sequence[int]], *, bucket: int = BUCKET, limit: int | None = None) -> Prompts:
    """Pads ragged ids on the right, to a multiple of `bucket` so that prompts of similar length share one program.

    Args:
      prompts: ids, at least one for each prompt.
      bucket: the width is a multiple of it, or `limit` where that is smaller; 1..1048576.
      limit: the most tokens that a prompt may have: `model.max_positions`, or None for no limit.

    Raises:
      ValueError: no prompt, an empty one, one longer than the limit, or a value that is no id.

    >>> pad_prompts([[5, 6, 7], [8]], bucket=4).tokens.tolist()
    [[5, 6, 7, 0], [8, 0, 0, 0]]
    >>> pad_prompts([[5, 6, 7], [8]], bucket=32, limit=5).tokens.shape
    (2, 5)
    """
    bucket = integers.static(bucket, "bucket", most=_MOST_BUCKET)
    limit = None if limit is None else integers.static(limit, "limit")
    rows = [_checked(row, ids) for row, ids in enumerate(_listed(prompts, "prompts", "lists of ids, as in [[5, 6]]"))]
    lengths = np.array([len(ids) for ids in rows], np.int32)
    longest = int(lengths.max())
    width = -(-longest // bucket) * bucket
    if limit is not None:
        if longest > limit:
            raise ValueError(
                f"prompt {lengths.argmax()} has {longest} tokens, and the model has {limit} positions: shorten it."
            )
        width = min(width, limit)
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return Prompts(tokens, lengths)


def _listed(values: Any, name: str, wanted: str) -> list[Any]:
    """One or more values, in a list."""
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"{name} must be a list of {wanted}, got {type(values).__name__}.") from None
    if not values:
        raise ValueError(f"{name} is empty: there must be one or more {wanted}.")
    return values


def _checked(row: int, ids: Any) -> np.ndarray:
    """The ids of one prompt."""
    if isinstance(ids, Sequence) and len(ids) == 0:
        raise ValueError(f"prompt {row} has no token: start it with the tokenizer's BOS token.")
    host = np.asarray(integers.whole(ids, f"prompt {row}", "[P]", ids=True))
    if host.ndim != 1:
        raise ValueError(f"prompt {row} must be a list of ids, got {ids!r}: for a single prompt pass [ids].")
    if host.size == 0:
        raise ValueError(f"prompt {row} has no token: start it with the tokenizer's BOS token.")
    return integers.exact(host, f"each id of prompt {row}", least=0)


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, bucket: int = BUCKET, limit: int | None = None) -> Prompts:
    """Token ids of `texts`, a list of strings, padded; `bucket` and `limit` as for `pad_prompts`.

    Raises:
      ValueError: `texts` is one string, not a list, or holds a value that is no string, an empty text, a text longer
        than the limit, or one that the tokenizer would cut; or `tokenizer` is no tokenizer.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string: for a single prompt pass [text].")
    given = _listed(texts, "texts", "strings")
    if not all(callable(getattr(tokenizer, name, None)) for name in _OF_TOKENIZERS):
        raise ValueError(
            f"tokenizer must be a tokenizers.Tokenizer, got {type(tokenizer).__name__}: load it by "
            "text.load_tokenizer(path), or pass the backend_tokenizer of one of transformers."
        )
    return pad_prompts([_ids(tokenizer, row, text) for row, text in enumerate(given)], bucket=bucket, limit=limit)


def _ids(tokenizer: Tokenizer, row: int, text: str) -> list[int]:
    """All ids of one text: the tokenizer's padding is left out; a text that it would cut is an error."""
    if not isinstance(text, str):
        raise ValueError(f"texts must be a list of strings, got {type(text).__name__} at place {row}: decode it first.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt {row} is no text: {text[error.start]!r} at place {error.start} is half a character. Read it as "
            "UTF-8, without errors='surrogateescape'."
        ) from None
    encoding = tokenizer.encode(text)
    ids = [token for token, is_text in zip(encoding.ids, encoding.attention_mask, strict=True) if is_text]
    if encoding.overflowing:
        raise ValueError(
            f"the tokenizer cuts prompt {row} to {len(ids)} tokens: call tokenizer.no_truncation() first, or read the "
            "tokenizer by text.load_tokenizer, which does."
        )
    if not ids:
        raise ValueError(f"prompt {row} is empty: give at least one character.")
    return ids


def generate_text(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stop: str | Sequence[str] = (),
    skip_special_tokens: bool = True,
    **options: Any,
) -> list[str]:
    """The continuation of each text, without the text itself.

    Each ends at `max_new_tokens`, at a stop token or before a stop string. If the output ends inside a character that
    several tokens spell, it ends with U+FFFD.

    Args:
      model, params, drafter, drafter_params: as for `specjax.generate`.
      tokenizer: from `load_tokenizer`.
      texts: the prompts.
      stop: strings that end a text, one or several; a text ends before the first place where one begins.
      skip_special_tokens: leave out the tokenizer's special tokens, such as the one that ends a text.
      options: as for `specjax.generate`. The default of `stop_tokens` is `model.stop_tokens`, which `models.load` takes
        from the checkpoint; () is none.

    Raises:
      ValueError: an empty prompt or stop string, or as `specjax.generate`.

    >>> import specjax
    >>> from specjax import models, text
    >>> target = models.load(models.PRETRAINED / "target", dtype="float32")
    >>> draft = models.load(models.PRETRAINED / "draft", dtype="float32")
    >>> drafter = specjax.drafters.draft_model(draft.model)
    >>> tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    >>> out = text.generate_text(target.model, target.params, drafter, draft.params, tokenizer, ["import numpy as"],
    ...                          max_new_tokens=2)
    >>> out
    ['\\n\\n']
    """
    call = _call(model, params, drafter, drafter_params, tokenizer, texts, options)
    if stop_strings(stop):
        streamed = {name: value for name, value in call.options.items() if name not in _OF_GENERATE}
        call = call._replace(options={**streamed, "rounds_per_dispatch": _ROUNDS_PER_DISPATCH})
        pieces = [piece for _, new in _followed(call, tokenizer, stop, skip_special_tokens) for piece in new]
        return ["".join(piece.text for piece in pieces if piece.row == row) for row in range(len(call.prompts.lengths))]
    out = generate(*call.arguments, **call.options)
    warn_of_troubles(np.asarray(out.status))
    codec = detokenize.codec(tokenizer, skip_special_tokens=skip_special_tokens)
    rows = zip(call.prompts.ids(), out.new_tokens(), strict=True)
    return ["".join(detokenize.split(codec, prompt, new)) for prompt, new in rows]


def stream_text(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stop: str | Sequence[str] = (),
    skip_special_tokens: bool = True,
    **options: Any,
) -> Iterator[Piece]:
    """Yields the text of each new token as soon as it is final; the same text as `generate_text`.

    A piece is held back while later tokens can change its text: the beginning of a character, a run of byte tokens
    (<0x0A> and the like), text that may be the beginning of a stop string. Arguments and errors as for `generate_text`;
    other options as for `specjax.stream`.
    """
    call = _call(model, params, drafter, drafter_params, tokenizer, texts, options)
    followed = _followed(call, tokenizer, stop, skip_special_tokens)
    return (piece for _, pieces in followed for piece in pieces)


def trace_text(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stop: str | Sequence[str] = (),
    skip_special_tokens: bool = True,
    **options: Any,
) -> Trace:
    """Generates and records every round. A notebook shows for each token where it came from and how likely it was.

    `str` of the result is the text, `specjax.viewer.save(result, "trace.html")` makes a page of it. The trace holds the
    tokens of a stop string, but not its text. Arguments and errors as for `generate_text`; other options as for
    `specjax.stream`.
    """
    call = _call(model, params, drafter, drafter_params, tokenizer, texts, options)
    chunks = (chunk for chunk, _ in _followed(call, tokenizer, stop, skip_special_tokens))
    decode = detokenize.codec(tokenizer, skip_special_tokens=skip_special_tokens).decode
    return trace.collect(chunks, call.prompts.ids(), decode, name=tokenizer.id_to_token, stop=stop)


class _Call(NamedTuple):
    """The arguments of `generate` and `stream` for some texts."""

    prompts: Prompts
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def _call(
    model: Model, params: PyTree, drafter: Drafter, drafter_params: PyTree, tokenizer: Tokenizer, texts: Sequence[str],
    options: dict[str, Any],
) -> _Call:  # fmt: skip
    """Prompts within the model's positions, parts within the tokenizer's vocabulary, the checkpoint's stop tokens."""
    parts.check_kinds(model, drafter)
    refuse_traced("text is made", "inside jit call specjax.generate.", (params, drafter_params, options))
    prompts = encode(tokenizer, texts, limit=model.max_positions)
    model = within_vocab(model, tokenizer)
    if drafter.vocab_size is not None:
        drafter = drafter._replace(vocab_size=_known(drafter.vocab_size, tokenizer))
    arguments = (model, params, drafter, drafter_params, *prompts)
    return _Call(prompts, arguments, {"stop_tokens": model.stop_tokens, **options})


def _followed(
    call: _Call, tokenizer: Tokenizer, stop: str | Sequence[str], skip_special_tokens: bool
) -> Iterator[tuple[Chunk, list[Piece]]]:
    printer = Printer(tokenizer, call.prompts.ids(), stop=stop, skip_special_tokens=skip_special_tokens)
    return printer.follow(stream(*call.arguments, **call.options))
