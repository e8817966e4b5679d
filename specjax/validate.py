"""Arguments: everything that can be known to be wrong before running is a ValueError that says what to do.

Shapes and dtypes are always checked. Values are checked where they are known (outside the caller's jit); traced ones
cannot raise, and end their row with a `Status` instead.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from specjax.sharding import check_batch
from specjax.types import Array, Model, Sampling

_log = logging.getLogger(__name__)


_NO_LIMIT = np.int32(np.iinfo(np.int32).max)


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


class Checked(NamedTuple):
    """A request and its static capacity."""

    arrays: Request
    capacity: int


def is_traced(tree: Any) -> bool:
    """Whether any leaf belongs to a trace under way."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def known(value: Any) -> np.ndarray | None:
    """The value on the host, or None while it is traced or parts of it are other processes'."""
    if is_traced(value):
        return None
    is_elsewhere = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(value))
    return None if is_elsewhere else np.asarray(value)


def at_least_one(value: int, name: str) -> None:
    """Checks a static count."""
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}.")


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
) -> Checked:
    """Checks and normalises the arguments that `generate`, `autoregressive` and `stream` share."""
    if jnp.result_type(float) == jnp.float64:
        raise ValueError(
            "jax_enable_x64 is on, and specjax computes in 32 bits or fewer: unset JAX_ENABLE_X64, or put the call "
            "into `with jax.enable_x64(False):`."
        )
    prompts = _integers(prompts, "prompts", "[B, P]")
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
    drafting = _per_row(_NO_LIMIT if max_draft_len is None else max_draft_len, "max_draft_len", batch, scalar=True)
    stops = _ids(stop_tokens, "stop_tokens", batch, model.vocab_size)
    _check_prompt_values(prompts, lengths, model.vocab_size)
    _check_at_least(limits, "max_new_tokens", 1)
    _check_at_least(drafting, "max_draft_len", 0)
    capacity = _capacity(model, width, limits, lengths, capacity)
    arrays = Request(
        prompts=jnp.asarray(prompts, jnp.int32),
        prompt_lengths=jnp.asarray(lengths, jnp.int32),
        key=jax.random.key(0) if key is None else _key(key),
        limits=jnp.broadcast_to(jnp.asarray(limits, jnp.int32), (batch,)),
        draft_limits=jnp.broadcast_to(jnp.asarray(drafting, jnp.int32), (batch,)),
        sampling=_sampling(sampling, batch, model.vocab_size),
        stop_tokens=stops,
        seeds=jnp.asarray(seeds, jnp.int32),
    )
    return Checked(arrays, capacity)


def pad_token(token: Any) -> None:
    """Checks the filler of `Generation.tokens`: any integer, in the vocabulary or not."""
    if np.shape(token) != () or not jnp.issubdtype(jnp.result_type(token), jnp.integer):
        raise ValueError(f"pad_token must be one integer, got {token!r}. Use 0, or -1 for an id that no text holds.")


def _integers(value: Any, name: str, shape: str) -> Any:
    value = value if isinstance(value, jax.Array) else _array(value, name, shape)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers {shape}, got dtype {value.dtype}: pass whole numbers, int32.")
    return value


def _array(value: Any, name: str, shape: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name} must be one array {shape}, got rows of different lengths: pad them (specjax.text.pad_prompts for "
            "prompts, -1 for ids)."
        ) from None


def _per_row(value: Any, name: str, batch: int, *, scalar: bool = False) -> Any:
    expected = f"[B] = [{batch}]" + (" or a scalar" if scalar else "")
    value = _integers(value, name, expected)
    if value.shape != (batch,) and not (scalar and value.ndim == 0):
        raise ValueError(f"{name} must have shape {expected}, got {value.shape}: one entry per row of prompts.")
    return value


def _check_prompt_values(prompts: Any, lengths: Any, vocab_size: int) -> None:
    width = prompts.shape[1]
    host_lengths, host_prompts = known(lengths), known(prompts)
    if host_lengths is None:
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


def _check_at_least(value: Any, name: str, least: int) -> None:
    host = known(value)
    if host is not None and (host < least).any():
        raise ValueError(f"{name} must be {least} or more, got {host.min()}.")


def _capacity(model: Model, width: int, limits: Any, lengths: Any, capacity: int | None) -> int:
    if capacity is None:
        host = known(limits)
        if host is None:
            raise ValueError(
                "max_new_tokens is traced, so the buffers' size is unknown: pass capacity=, the most tokens that a row "
                "may hold, prompt included."
            )
        capacity = width + int(host.max())
        if model.max_positions is not None and capacity > model.max_positions:
            capacity = max(model.max_positions, width)
            _log.warning(
                "max_new_tokens=%d asks for more than the model's %d positions: rows that get there end as CACHE_FULL",
                int(host.max()), model.max_positions,
            )  # fmt: skip
    capacity = int(capacity)
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
    key = jnp.asarray(key)
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if (is_typed and key.ndim == 0) or (not is_typed and key.dtype == jnp.uint32 and key.ndim == 1):
        return key
    raise ValueError(
        f"key must be one PRNG key, got shape {key.shape} and dtype {key.dtype}: pass jax.random.key(seed); "
        "rows get keys of their own from it (see seeds)."
    )


def _ids(ids: Any, name: str, batch: int, vocab_size: int) -> Array:
    """Token ids [n] or [B, n], pad -1, as [B, n] int32."""
    if not isinstance(ids, jax.Array):
        ids = _array(ids, name, "[n] or [B, n]")
        ids = ids.astype(np.int32) if ids.size == 0 else ids
    ids = _integers(ids, name, "[n] or [B, n]")
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[0] != batch):
        raise ValueError(f"{name} must have shape [n] or [B, n] with B = {batch}, got {ids.shape}.")
    host = known(ids)
    if host is not None and ((host >= vocab_size) | (host < -1)).any():
        bad = host[(host >= vocab_size) | (host < -1)][0]
        raise ValueError(f"{name} holds {bad}, outside the vocabulary 0..{vocab_size - 1}; pad with -1.")
    return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (batch, ids.shape[-1]))


def _sampling(sampling: Sampling, batch: int, vocab_size: int) -> Sampling:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a specjax.Sampling, got {type(sampling).__name__}.")
    rules = {
        "temperature": (lambda x: np.isfinite(x) & (x >= 0), "finite and 0 or more (0 is greedy)"),
        "top_k": (lambda x: x >= 0, "0 or more (0 keeps all)"),
        "top_p": (lambda x: (x > 0) & (x <= 1), "in (0, 1] (1 keeps all)"),
        "min_p": (lambda x: (x >= 0) & (x < 1), "in [0, 1) (0 keeps all)"),
        "repetition_penalty": (lambda x: np.isfinite(x) & (x > 0), "finite and above 0 (1 is none)"),
        "presence_penalty": (np.isfinite, "finite (0 is none)"),
        "frequency_penalty": (np.isfinite, "finite (0 is none)"),
        "min_new_tokens": (lambda x: x >= 0, "0 or more"),
    }
    for name, (is_valid, wanted) in rules.items():
        value = getattr(sampling, name)
        if value is None:
            continue
        kind = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
        is_whole = name in ("top_k", "min_new_tokens")
        if not jnp.issubdtype(kind, jnp.integer if is_whole else jnp.number):
            raise ValueError(f"sampling.{name} must hold {'whole ' * is_whole}numbers, got {kind}: {value!r}.")
        shape = np.shape(value)
        if shape not in ((), (batch,)):
            raise ValueError(f"sampling.{name} must be a scalar or have shape [B] = [{batch}], got {shape}.")
        host = known(value)
        if host is not None and not is_valid(host).all():
            bad = host if host.ndim == 0 else host[~is_valid(host)][0]
            raise ValueError(f"sampling.{name} must be {wanted}, got {bad}.")
    _logit_bias(sampling.logit_bias, batch, vocab_size)
    words = None if sampling.bad_words is None else _ids(sampling.bad_words, "sampling.bad_words", batch, vocab_size)
    arrays = {name: jnp.asarray(value) for name, value in sampling._asdict().items() if value is not None}
    return sampling._replace(**{**arrays, "bad_words": words})


def _logit_bias(bias: Any, batch: int, vocab_size: int) -> None:
    if bias is None:
        return
    if np.shape(bias) not in ((vocab_size,), (1, vocab_size), (batch, vocab_size)):
        raise ValueError(
            f"sampling.logit_bias must have shape [V] = [{vocab_size}] or [B, V] = [{batch}, {vocab_size}], "
            f"got {type(bias).__name__} {np.shape(bias)}. From ids to numbers: jnp.zeros(V).at[ids].set(numbers)."
        )
    host = known(bias)
    if host is not None and (np.isnan(host) | (host == np.inf)).any():
        raise ValueError("sampling.logit_bias holds NaN or +inf: use finite numbers, or -inf to forbid a token.")
