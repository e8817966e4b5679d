"""Checks of arguments: a mistake that can be found before running is a ValueError that says what to do.

Shapes and dtypes are always checked. Values are checked where they are known (outside the caller's jit). Wrong traced
values cannot raise; they end their row with a `Status` instead.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import integers
from specjax.noise import IMPLEMENTATION
from specjax.sharding import check_batch
from specjax.traced import known
from specjax.types import Array, Model, PyTree, Sampling

_log = logging.getLogger(__name__)

_MOST_TOKENS = 2**30  # of a row: its slot numbers stay within int32, also with a round added and rounded up
_KEY_WORDS = (2, 4)  # of legacy keys: Threefry, and rbg


class Request(NamedTuple):
    """The checked arrays of one call."""

    prompts: Array  # [B, P] int32
    prompt_lengths: Array  # [B] int32
    key: Array
    limits: Array  # [B] int32, most new tokens
    draft_limits: Array  # [B] int32, most tokens to draft in a round
    sampling: Sampling
    stop_tokens: Array  # [B, n] int32
    seeds: Array  # [B] int32
    inputs: PyTree = None  # [B, ...] each, what an encoder reads


class Checked(NamedTuple):
    """A request and its static capacity."""

    arrays: Request
    capacity: int


def request(
    model: Model,
    prompts: Any,
    prompt_lengths: Any,
    *,
    key: Any,
    max_new_tokens: Any,
    sampling: Sampling,
    stop_tokens: Any,
    seeds: Any,
    capacity: int | None,
    max_draft_len: Any = None,
    inputs: PyTree = None,
) -> Checked:
    """Checks and normalises the arguments that `generate`, `autoregressive` and `stream` share."""
    if jnp.result_type(float) == jnp.float64:
        raise ValueError(
            "jax_enable_x64 is on, and specjax computes in 32 bits or fewer: unset JAX_ENABLE_X64, or put the call "
            "into `with jax.enable_x64(False):`."
        )
    prompts = integers.whole(prompts, "prompts", "[B, P]", ids=True)
    if prompts.ndim != 2:
        raise ValueError(
            f"prompts must have shape [B, P], got {prompts.shape}. For one prompt pass prompts[None]; "
            "for ragged ones specjax.text.pad_prompts makes the array."
        )
    batch, width = prompts.shape
    if batch == 0 or width == 0:
        raise ValueError(f"prompts is empty: shape {prompts.shape}. Every row needs at least one token (a BOS, say).")
    if prompt_lengths is None:
        prompt_lengths = np.full((batch,), width, np.int32)
    check_batch(model.layout, batch)
    lengths = _per_row(prompt_lengths, "prompt_lengths", batch)
    seeds = _per_row(np.arange(batch, dtype=np.int32) if seeds is None else seeds, "seeds", batch)
    limits = _per_row(max_new_tokens, "max_new_tokens", batch, scalar=True)
    drafting = _per_row(integers.MOST if max_draft_len is None else max_draft_len, "max_draft_len", batch, scalar=True)
    stops = _ids(stop_tokens, "stop_tokens", batch, model.vocab_size)
    _check_prompt_values(prompts, lengths, model.vocab_size)
    asked, limits = limits, integers.at_most(limits, "max_new_tokens", least=1)
    drafting = integers.at_most(drafting, "max_draft_len", least=0)
    if capacity is not None:
        capacity = integers.static(capacity, "capacity", most=_MOST_TOKENS)
    prompts = _within_capacity(model, prompts, lengths, capacity)
    capacity = _capacity(model, prompts.shape[1], asked, lengths, capacity)
    arrays = Request(
        prompts=jnp.asarray(integers.padding(prompts)),
        prompt_lengths=jnp.asarray(integers.padding(lengths)),
        key=jax.random.key(0, impl=IMPLEMENTATION) if key is None else _key(key),
        # No row gets longer than its capacity, and a larger limit could wrap where the prompt's length is added.
        limits=jnp.broadcast_to(jnp.minimum(jnp.asarray(limits), capacity), (batch,)),
        draft_limits=jnp.broadcast_to(jnp.asarray(drafting), (batch,)),
        sampling=_sampling(sampling, batch, model.vocab_size),
        stop_tokens=stops,
        seeds=jnp.asarray(integers.exact(seeds, "seeds")),
        inputs=_inputs(model, inputs, batch),
    )
    return Checked(arrays, capacity)


def _inputs(model: Model, inputs: PyTree, batch: int) -> PyTree:
    if model.takes_inputs and inputs is None:
        raise ValueError("this model reads inputs, as encoder-decoders do: pass inputs=, a pytree of arrays [B, ...].")
    if inputs is not None and not model.takes_inputs:
        raise ValueError("this model takes no inputs (its Model says takes_inputs=False): leave inputs out.")
    inputs = jax.tree.map(jnp.asarray, inputs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if leaf.ndim == 0 or leaf.shape[0] != batch:
            name = f"inputs{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} must have shape [B, ...] with B = {batch}, got {leaf.shape}: one entry per row.")
    return inputs


def pad_token(token: Any) -> Any:
    """The filler of `Generation.tokens`, checked: any int32, in the vocabulary or not; it may be traced."""
    kind = token.dtype if isinstance(token, jax.Array) else np.asarray(token).dtype
    if np.shape(token) != () or not (jnp.issubdtype(kind, jnp.integer) or type(token) is int):
        raise ValueError(f"pad_token must be one integer, got {token!r}. Use 0, or -1 for an id that no text holds.")
    return integers.exact(integers.whole(token, "pad_token", "[]"), "pad_token")


def _per_row(value: Any, name: str, batch: int, *, scalar: bool = False) -> Any:
    expected = f"[B] = [{batch}]" + (" or a scalar" if scalar else "")
    value = integers.whole(value, name, expected)
    if value.shape != (batch,) and not (scalar and value.ndim == 0):
        raise ValueError(f"{name} must have shape {expected}, got {value.shape}: one entry per row of prompts.")
    return value


def _check_prompt_values(prompts: Any, lengths: Any, vocab_size: int) -> None:
    width = prompts.shape[1]
    host_lengths, host_prompts = known(lengths), known(prompts)
    if host_lengths is None:
        # The lengths are not known, so any column may be text: an id that int32 cannot hold is wrong everywhere.
        integers.exact(prompts, "prompts")
        return
    for row, length in enumerate(host_lengths):
        if length < 1:
            raise ValueError(
                f"the prompt of row {row} is empty (prompt_lengths[{row}] = {length}). "
                "Every row needs at least one token: start it with the tokenizer's BOS token."
            )
        if length > width:
            raise ValueError(
                f"prompt_lengths[{row}] = {length}, but prompts has only {width} columns: lengths are 1..P."
            )
    if host_prompts is None:
        return
    in_prompt = np.arange(width) < host_lengths[:, None]
    bad = in_prompt & ((host_prompts < 0) | (host_prompts >= vocab_size))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"prompts[{row}, {column}] = {host_prompts[row, column]} is outside the vocabulary 0..{vocab_size - 1}. "
            "Was the text encoded with another model's tokenizer?"
        )


def _within_capacity(model: Model, prompts: Any, lengths: Any, capacity: int | None) -> Any:
    """Drops prompt columns past the capacity or the model's positions, if they are padding in every row."""
    width, most = prompts.shape[1], model.max_positions
    if capacity is not None:
        most = capacity if most is None else min(most, capacity)
    if most is None or width <= most:
        return prompts
    host = known(lengths)
    if host is not None:
        return prompts[:, :most] if host.max() <= most else prompts
    if capacity is None or capacity >= width:
        raise ValueError(
            f"prompts has {width} columns and the model {most} positions; prompt_lengths is traced, so how many of "
            f"them are padding is unknown: cut them, prompts[:, :{most}]."
        )
    return prompts


def _capacity(model: Model, width: int, limits: Any, lengths: Any, capacity: int | None) -> int:
    if capacity is None:
        host = known(limits)
        if host is None:
            raise ValueError(
                "max_new_tokens is traced, so the buffers' size is unknown: pass capacity=, the most tokens that a row "
                "may hold, prompt included."
            )
        most = int(host.max())
        capacity = min(width + most, integers.MOST)
        if model.max_positions is not None and capacity > model.max_positions:
            capacity = max(model.max_positions, width)
            starts = known(lengths)
            ends = (width if starts is None else starts.astype(np.int64)) + np.asarray(
                np.minimum(host, integers.MOST), np.int64
            )
            if ends.max() > model.max_positions:
                _log.warning(
                    "max_new_tokens=%d asks for more than the model's %d positions: rows that get there end as "
                    "CACHE_FULL", most, model.max_positions,
                )  # fmt: skip
        elif capacity > _MOST_TOKENS:
            raise ValueError(
                f"max_new_tokens={most} sets no limit, and buffers need one: pass capacity=, the most tokens "
                "that a row may hold, prompt included."
            )
    if capacity < width:
        longest = known(lengths)
        said = f"{width} columns" if longest is None else f"{width} columns (longest prompt {longest.max()})"
        raise ValueError(
            f"prompts has {said}, longer than capacity={capacity}. Pass a larger capacity, or cut the prompts to it."
        )
    if model.max_positions is not None and capacity > model.max_positions:
        raise ValueError(
            f"capacity {capacity} (prompt plus new tokens) exceeds the model's {model.max_positions} positions. "
            "Shorten the prompts or lower max_new_tokens or capacity."
        )
    return capacity


def _key(key: Any) -> Array:
    given = integers.array(key, "key", "of one PRNG key")
    if not isinstance(given, jax.Array) and given.dtype.kind in "USO":
        raise ValueError(
            f"key must be one PRNG key, got {type(key).__name__}: pass jax.random.key(seed); rows get keys of their "
            "own from it (see seeds)."
        )
    key = jnp.asarray(given)
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_legacy = not is_typed and key.dtype == jnp.uint32 and key.shape in [(size,) for size in _KEY_WORDS]
    if (is_typed and key.ndim == 0) or is_legacy:
        return key
    raise ValueError(
        f"key must be one PRNG key, got shape {key.shape} and dtype {key.dtype}: pass jax.random.key(seed); "
        "rows get keys of their own from it (see seeds)."
    )


def _ids(ids: Any, name: str, batch: int, vocab_size: int) -> Array:
    """Token ids [n] or [B, n], pad -1, as [B, n] int32."""
    ids = integers.array(ids, name, "[n] or [B, n]")
    ids = integers.whole(ids.astype(np.int32) if ids.size == 0 else ids, name, "[n] or [B, n]", ids=True)
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[0] != batch):
        raise ValueError(f"{name} must have shape [n] or [B, n] with B = {batch}, got {ids.shape}.")
    host = known(ids)
    if host is not None and ((host >= vocab_size) | (host < -1)).any():
        bad = host[(host >= vocab_size) | (host < -1)][0]
        raise ValueError(f"{name} holds {bad}, outside the vocabulary 0..{vocab_size - 1}; pad with -1.")
    return jnp.broadcast_to(jnp.asarray(ids.astype(np.int32)), (batch, ids.shape[-1]))


def _sampling(sampling: Sampling, batch: int, vocab_size: int) -> Sampling:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a specjax.Sampling, got {type(sampling).__name__}.")
    rules = {
        "temperature": (lambda x: np.isfinite(x) & (x >= 0), "finite and 0 or more (0 is greedy)"),
        "top_p": (lambda x: (x > 0) & (x <= 1), "in (0, 1] (1 keeps all)"),
        "min_p": (lambda x: (x >= 0) & (x < 1), "in [0, 1) (0 keeps all)"),
        "repetition_penalty": (lambda x: np.isfinite(x) & (x > 0), "finite and above 0 (1 is none)"),
        "presence_penalty": (np.isfinite, "finite (0 is none)"),
        "frequency_penalty": (np.isfinite, "finite (0 is none)"),
    }
    for name, (is_valid, wanted) in rules.items():
        value = getattr(sampling, name)
        if value is None:
            continue
        value = _real(value, name)
        _one_or_each(value, name, batch)
        host = known(value)
        if host is None:
            continue
        is_sound = is_valid(_in_float32(host))
        if not is_sound.all():
            bad = host if host.ndim == 0 else host[~is_sound][0]
            said = f" ({_in_float32(bad)} in float32)" if is_valid(bad) else ""
            raise ValueError(f"sampling.{name} must be {wanted}, got {bad}{said}.")
    counts = {name: getattr(sampling, name) for name in ("top_k", "min_new_tokens")}
    for name in [name for name, value in counts.items() if value is not None]:
        value = integers.whole(counts[name], f"sampling.{name}", "[] or [B]")
        _one_or_each(value, name, batch)
        counts[name] = integers.at_most(value, f"sampling.{name}", least=0)
    _logit_bias(sampling.logit_bias, batch, vocab_size)
    words = None if sampling.bad_words is None else _ids(sampling.bad_words, "sampling.bad_words", batch, vocab_size)
    given = {**sampling._asdict(), **counts}
    arrays = {name: jnp.asarray(value) for name, value in given.items() if value is not None and name != "bad_words"}
    return sampling._replace(**{**arrays, "bad_words": words})


def _real(value: Any, name: str) -> Any:
    numbers = integers.array(value, f"sampling.{name}", "of numbers")
    kind = numbers.dtype
    if not jnp.issubdtype(kind, jnp.number) or jnp.issubdtype(kind, jnp.complexfloating):
        raise ValueError(f"sampling.{name} must hold numbers, got {kind}: {value!r}.")
    return numbers


def _in_float32(host: np.ndarray) -> np.ndarray:
    """The numbers in float32, as programs hold them; infinite where they are too large."""
    with np.errstate(over="ignore"):
        return np.asarray(host, np.float32)


def _one_or_each(value: Any, name: str, batch: int) -> None:
    if np.shape(value) not in ((), (batch,)):
        raise ValueError(f"sampling.{name} must be a scalar or have shape [B] = [{batch}], got {np.shape(value)}.")


def _logit_bias(bias: Any, batch: int, vocab_size: int) -> None:
    if bias is None:
        return
    if np.shape(bias) not in ((vocab_size,), (1, vocab_size), (batch, vocab_size)):
        raise ValueError(
            f"sampling.logit_bias must have shape [V] = [{vocab_size}] or [B, V] = [{batch}, {vocab_size}], "
            f"got {type(bias).__name__} {np.shape(bias)}. From ids to numbers: jnp.zeros(V).at[ids].set(numbers)."
        )
    _real(bias, "logit_bias")
    host = known(bias)
    if host is None:
        return
    narrow = _in_float32(host)
    if (np.isnan(narrow) | (narrow == np.inf)).any() or (np.isinf(narrow) & np.isfinite(host)).any():
        raise ValueError(
            "sampling.logit_bias holds NaN, +inf or a number that float32 does not hold: use finite numbers, or -inf "
            "to forbid a token."
        )
