"""Tries a module on a few tokens: is it a causal language model, and is a way of using its cache correct for it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.adapters.wrapped import PassInput, Wrapped
from specjax.types import Array, Model, PyTree

_ROWS, _WIDTH = 3, 12
_FIRST, _MORE, _LAST = 5, 3, 2  # tokens of three passes; the second fills its block in two parts
_KEEPS = (np.array([5, 2, 3]), np.array([1, 3, 0]))


class Trial(NamedTuple):
    """Tokens to try a module on, and its logits of whole texts."""

    params: PyTree
    tokens: Array  # [3, 12] int32
    whole: Callable[[PyTree, Array], Array]  # (params, tokens [3, 12]) -> logits; jitted
    tolerance: float  # largest difference of logits that count as equal


def make_trial(wrapped: Wrapped, params: PyTree, vocab_size: int) -> Trial:
    """Checks the module without its cache, and makes the trial for its cache.

    Raises:
      ValueError: it is no causal language model of independent rows; the message says what may be the cause.
    """

    @jax.jit
    def whole(params: PyTree, tokens: Array) -> Array:
        rows, width = tokens.shape
        place = jnp.arange(width)
        causal = jnp.broadcast_to((place[None] <= place[:, None])[None], (rows, width, width))
        positions = jnp.broadcast_to(place[None], tokens.shape)
        return wrapped.run(params, PassInput(tokens, positions, causal)).logits.astype(jnp.float32)

    tokens = jax.random.randint(jax.random.key(0), (_ROWS, _WIDTH), 0, vocab_size)
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params) if _is_float(leaf)), default=1.2e-7)
    with jax.default_matmul_precision("highest"):
        params, effect = _text_dependent(whole, params, tokens, vocab_size)
        plain = whole(params, tokens)
        # Smaller than the effect of one token: the rounding of bfloat16 alone would let a wrong cache pass.
        tolerance = min(max(1e-3, 8 * eps) * float(jnp.max(jnp.abs(plain))), effect / 4)
        trial = Trial(params, tokens, whole, tolerance)
        _check_causal(trial, plain, vocab_size)
        _check_rows(trial, plain)
    return trial


def cache_error(trial: Trial, model: Model, slots: int) -> str | None:
    """Compares passes through a cache with the logits of whole texts; None if they agree, else what differs.

    The passes include rows of different lengths, rejected tokens and a block that is filled in two parts.
    """
    parts = np.split(np.asarray(trial.tokens), [_FIRST, _FIRST + _MORE, _FIRST + _MORE + _LAST], 1)[:3]

    @jax.jit
    def run(params: PyTree, keeps: list[Array]) -> list[Array]:
        first, more, last = (jnp.asarray(part) for part in parts)
        cache = model.init_cache(params, _ROWS, slots)
        out = model.apply(params, first, cache, model.init_block(params, _ROWS, _FIRST))
        cache = model.commit(cache, out.block, keeps[0], None)
        early = model.apply(params, more[:, :2], cache, model.init_block(params, _ROWS, _MORE))
        late = model.apply(params, more[:, 2:], cache, early.block)
        cache = model.commit(cache, late.block, keeps[1], None)
        end = model.apply(params, last, cache, model.init_block(params, _ROWS, _LAST))
        return [out.logits, jnp.concatenate([early.logits, late.logits], 1), end.logits]

    with jax.default_matmul_precision("highest"):
        got = run(trial.params, [jnp.asarray(keep) for keep in _KEEPS])
        worst = 0.0
        for index, logits in enumerate(got):
            wanted = _wanted(trial, parts, index)
            worst = max(worst, _difference(logits, wanted))
        if worst <= trial.tolerance:
            return None
        other = run(trial.params, [jnp.asarray(np.array([4, 2, 3])), jnp.asarray(_KEEPS[1])])
    if _difference(other[2][1], got[2][1]) > trial.tolerance:
        return "row 1's logits changed when row 0's length changed: this cache keeps one cursor for all rows"
    return f"its logits are not those of the whole text: they differ by {worst:.2g}, allowed {trial.tolerance:.2g}"


def handles_trees(trial: Trial, model: Model, slots: int) -> bool:
    """Whether a token sees only its own branch (root 0 -> 1 -> 2 and 0 -> 3 -> 4), and whether commit keeps a path."""
    visible = jnp.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], bool)
    text = trial.tokens
    nodes = jnp.concatenate([text[:, 2:5], text[:, 8:10]], 1)

    @jax.jit
    def run(params: PyTree) -> list[Array]:
        cache = model.init_cache(params, _ROWS, slots)
        out = model.apply(params, text[:, :2], cache, model.init_block(params, _ROWS, 2))
        cache = model.commit(cache, out.block, jnp.full((_ROWS,), 2), None)
        block = model.init_block(params, _ROWS, 5)
        tree = model.apply(params, nodes, cache, block, depths=jnp.array([0, 1, 2, 1, 2]), visible=visible)
        path = jnp.broadcast_to(jnp.array([0, 3, 4, 4, 4])[None], (_ROWS, 5))
        cache = model.commit(cache, tree.block, jnp.full((_ROWS,), 3), path)
        end = model.apply(params, text[:, 10:11], cache, model.init_block(params, _ROWS, 1))
        return [tree.logits, end.logits]

    right = jnp.concatenate([text[:, :3], nodes[:, 3:], text[:, 10:11], text[:, 6:]], 1)[:, :_WIDTH]
    with jax.default_matmul_precision("highest"):
        tree, end = run(trial.params)
        left, right = (trial.whole(trial.params, texts) for texts in (text, right))
    wanted = jnp.concatenate([left[:, 2:5], right[:, 3:5]], 1)
    return max(_difference(tree, wanted), _difference(end[:, 0], right[:, 5])) <= trial.tolerance


def _text_dependent(whole, params: PyTree, tokens: Array, vocab_size: int) -> tuple[PyTree, float]:
    """Parameters whose logits depend on the text, and how much the first token changes later logits.

    A new module may start from zeros; with such parameters it would pass any check.
    """
    changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % vocab_size)
    plain = whole(params, tokens)
    if not bool(jnp.isfinite(plain).all()):
        raise ValueError("the module's logits are not finite on random tokens: check its parameters, or try float32.")
    effect = _difference(whole(params, changed)[:, 1:], plain[:, 1:])
    if effect > 0.02 * float(jnp.max(jnp.abs(plain))):
        return params, effect
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + (0.3 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype) if _is_float(leaf) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    params = structure.unflatten(noisy)
    plain = whole(params, tokens)
    effect = _difference(whole(params, changed)[:, 1:], plain[:, 1:])
    if effect <= 1e-3 * float(jnp.max(jnp.abs(plain))):
        raise ValueError(
            "the module's logits do not depend on earlier tokens, whatever its parameters: does the argument taken for "
            "its tokens hold them, and does its mask let it look back? Say otherwise by takes=adapters.Takes(...)."
        )
    return params, effect


def _check_rows(trial: Trial, plain: Array) -> None:
    twice = trial.tokens.at[1].set(trial.tokens[0])
    same = trial.whole(trial.params, twice)
    shorter = trial.whole(trial.params, trial.tokens[:, : _WIDTH - 1])  # random noise would have another shape here
    if max(_difference(same[0], same[1]), _difference(shorter, plain[:, : _WIDTH - 1])) > trial.tolerance:
        raise ValueError(
            "two identical rows, or two texts that begin alike, gave different logits: is dropout on, or does it draw "
            "random numbers in evaluation too? Adapt the module in its evaluation mode, or pass "
            "takes=adapters.Takes(..., fixed={'deterministic': True})."
        )
    if _difference(same[0], plain[0]) > trial.tolerance:
        raise ValueError(
            "row 0's logits changed when row 1's tokens changed: the module mixes the rows of its batch (batch norm in "
            "training mode, experts with a capacity), so a row's text would depend on its neighbours."
        )


def _check_causal(trial: Trial, plain: Array, vocab_size: int) -> None:
    cut = _WIDTH // 2
    later = trial.tokens.at[:, cut:].set((trial.tokens[:, cut:] + 1) % vocab_size)
    if _difference(trial.whole(trial.params, later)[:, :cut], plain[:, :cut]) > trial.tolerance:
        raise ValueError(
            "the logits of earlier tokens changed when later tokens changed: the module is not causal as it is called "
            "here. If it takes its causal mask from outside, name that argument: takes=adapters.Takes(..., mask=...), "
            "with mask_form=adapters.per_head where it wants [B, 1, T, S]."
        )


def _wanted(trial: Trial, parts: list[np.ndarray], index: int) -> Array:
    """The logits of pass `index`, from whole texts: the tokens that each row kept of earlier passes, then this pass."""
    texts, starts = np.array(trial.tokens), []
    for row in range(_ROWS):
        kept = [part[row, : keep[row]] for part, keep in zip(parts[:index], _KEEPS, strict=False)]
        text = np.concatenate([*kept, parts[index][row]])
        texts[row, : len(text)] = text
        starts.append(len(text) - parts[index].shape[1])
    logits = trial.whole(trial.params, jnp.asarray(texts))
    places = np.array(starts)[:, None] + np.arange(parts[index].shape[1])
    return jnp.take_along_axis(logits, jnp.asarray(places)[..., None], 1)


def _difference(one: Array, other: Array) -> float:
    difference = float(jnp.max(jnp.abs(one - other)))
    return float("inf") if np.isnan(difference) else difference


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
