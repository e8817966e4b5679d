"""The contract of a Model: a pass over a block equals single steps, and tokens that are not kept leave no trace."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import integers
from specjax.types import Array, Model, PyTree

_ROWS, _WIDTH, _SLOTS = 3, 7, 64


def check_model(
    model: Model, params: PyTree, *, tolerance: float = 1e-3, key: Array | None = None, inputs: PyTree = None
) -> list[str]:
    """Checks that `model` does what the loop relies on; tokens are random ids of its vocabulary.

    Args:
      model: under test.
      params: its parameters. Better float32: the comparisons are of logits.
      tolerance: the largest allowed difference of two logits that should be equal, relative to the largest of them.
      key: for the ids.
      inputs: of three rows, [3, ...], for a model that takes them.

    Returns:
      What was checked, one line each.

    Raises:
      AssertionError: what differs, and what that would break.

    >>> from specjax import testing
    >>> params = testing.random_table(jax.random.key(0), order=2, vocab_size=5)
    >>> len(testing.check_model(testing.table_model(2, 5), params))
    7
    """
    if not isinstance(model, Model):
        raise ValueError(f"model must be a specjax.Model, got {type(model).__name__}.")
    if model.max_positions is not None and model.max_positions < 3 * _WIDTH:
        raise ValueError(f"the checks need {3 * _WIDTH} positions, this model has {model.max_positions}.")
    tolerance = integers.real(tolerance, "tolerance", lambda x: 0 <= x < math.inf, "0 or more")
    key = jax.random.key(0) if key is None else key
    tokens = jax.random.randint(key, (_ROWS, _WIDTH), 0, model.vocab_size)
    other = jax.random.randint(jax.random.fold_in(key, 1), (_ROWS, _WIDTH), 0, model.vocab_size)
    if model.takes_inputs and inputs is None:
        raise ValueError("this model takes inputs: pass inputs=, a pytree of arrays [3, ...].")
    bench = _Bench(model, params, tolerance, inputs)
    checks = [_shapes, _steps, _appended, _rejected, _rows, _capacity]
    if model.extend is not None:
        checks.append(_extended)
    if model.trees:
        checks.append(_tree)
    for check in checks:
        check(bench, tokens, other)
    return [(check.__doc__ or "").strip() for check in checks]


class _Bench:
    def __init__(self, model: Model, params: PyTree, tolerance: float, inputs: PyTree):
        self.model, self.params, self.tolerance, self.inputs = model, params, tolerance, inputs
        self.apply = jax.jit(model.apply, static_argnames=("hidden_layers",))
        self.commit = jax.jit(model.commit)

    def cache(self, rows: slice = slice(_ROWS), slots: int = _SLOTS) -> PyTree:
        """An empty cache of these rows, no longer than the architecture's last position allows."""
        slots = min(slots, self.model.max_positions or slots)
        more = (jax.tree.map(lambda leaf: leaf[rows], self.inputs),) if self.model.takes_inputs else ()
        return self.model.init_cache(self.params, len(range(_ROWS)[rows]), slots, *more)

    def block(self, size: int, rows: int = _ROWS) -> PyTree:
        return self.model.init_block(self.params, rows, size)

    def read(self, cache: PyTree, tokens: Array, keep: Any = None) -> tuple[Array, PyTree]:
        """Logits of a block of these tokens, and the cache with the first `keep` of them."""
        rows, width = tokens.shape
        out = self.apply(self.params, tokens, cache, self.block(width, rows))
        keep = jnp.full((rows,), width) if keep is None else jnp.asarray(keep, jnp.int32)
        return out.logits, self.commit(cache, out.block, keep)

    def same(self, got: Array, wanted: Array, what: str) -> None:
        ours, theirs = (np.asarray(x, np.float64)[..., : self.model.vocab_size] for x in (got, wanted))
        allowed = self.tolerance * max(float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)), 1.0)
        both = np.isfinite(ours) & np.isfinite(theirs)
        worst = float(np.where(both, np.abs(np.where(both, ours, 0) - np.where(both, theirs, 0)), 0.0).max(initial=0.0))
        if worst > allowed or (np.isfinite(ours) != np.isfinite(theirs)).any():
            raise AssertionError(f"{what}: logits differ by {worst:.3g}, allowed {allowed:.3g}.")


def _shapes(bench: _Bench, tokens: Array, other: Array) -> None:
    """logits are float32 [B, T, columns], chosen places included; hidden states [B, T, D]"""
    del other
    layers = (0,) if bench.model.hidden else ()
    out = bench.apply(bench.params, tokens, bench.cache(), bench.block(_WIDTH), hidden_layers=layers)
    rows, width, columns = out.logits.shape
    if (rows, width) != tokens.shape or columns < bench.model.vocab_size or out.logits.dtype != jnp.float32:
        raise AssertionError(
            f"logits must be float32 [{_ROWS}, {_WIDTH}, at least {bench.model.vocab_size}], "
            f"got {out.logits.dtype} {out.logits.shape}."
        )
    if len(out.hidden) != len(layers) or any(state.shape[:2] != tokens.shape for state in out.hidden):
        raise AssertionError(f"hidden_layers=(0,) must give one [B, T, D], got {[x.shape for x in out.hidden]}.")
    places = jnp.array([[2, 5], [0, 1], [6, 6]])
    chosen = bench.apply(bench.params, tokens, bench.cache(), bench.block(_WIDTH), logits_at=places).logits
    bench.same(chosen, jnp.take_along_axis(out.logits, places[..., None], 1), "logits_at gives other logits")


def _steps(bench: _Bench, tokens: Array, other: Array) -> None:
    """a block of T tokens gives the logits of T single steps"""
    del other
    whole, _ = bench.read(bench.cache(), tokens)
    cache, singles = bench.cache(), []
    for place in range(_WIDTH):
        logits, cache = bench.read(cache, tokens[:, place : place + 1])
        singles.append(logits)
    bench.same(whole, jnp.concatenate(singles, 1), "verifying several tokens is not decoding them one by one")


def _appended(bench: _Bench, tokens: Array, other: Array) -> None:
    """tokens appended to an open block see those before them in it"""
    del other
    whole, _ = bench.read(bench.cache(), tokens)
    cache, block, parts = bench.cache(), bench.block(_WIDTH), []
    for start, end in ((0, 2), (2, 3), (3, _WIDTH)):
        out = bench.apply(bench.params, tokens[:, start:end], cache, block)
        block = out.block
        parts.append(out.logits)
    bench.same(jnp.concatenate(parts, 1), whole, "a block filled in parts is not the block filled at once")


def _rejected(bench: _Bench, tokens: Array, other: Array) -> None:
    """tokens that commit does not keep leave no trace, row by row (a recurrent state, a ring)"""
    keep = np.array([0, 2, 4])
    _, cache = bench.read(bench.cache(), tokens[:, :3])
    block = jnp.where(jnp.arange(4)[None] < keep[:, None], tokens[:, 3:], other[:, 3:])
    _, cache = bench.read(cache, block, keep)
    follow, _ = bench.read(cache, other[:, :2])
    for row, kept in enumerate(keep):
        text = jnp.concatenate([tokens[row, : 3 + kept], other[row, :2]])[None]
        clean, _ = bench.read(bench.cache(slice(row, row + 1)), text)
        bench.same(follow[row], clean[0, -2:], f"row {row} kept {kept} of 4 tokens and still knows of the others")


def _rows(bench: _Bench, tokens: Array, other: Array) -> None:
    """a row's logits do not depend on the other rows"""
    mixed, _ = bench.read(bench.cache(), jnp.stack([tokens[0], other[1], other[2]]))
    plain, _ = bench.read(bench.cache(), tokens)
    bench.same(mixed[0], plain[0], "row 0 changed with the other rows")


def _capacity(bench: _Bench, tokens: Array, other: Array) -> None:
    """logits do not depend on the cache's capacity"""
    small, large = bench.cache(), bench.cache(slots=5 * _SLOTS)
    _, small = bench.read(small, tokens)
    _, large = bench.read(large, tokens)
    bench.same(bench.read(small, other)[0], bench.read(large, other)[0], "a larger cache gives other logits")


def _extended(bench: _Bench, tokens: Array, other: Array) -> None:
    """extend reads as apply and commit do, row by row, and goes on from what was read before"""
    keep, places = jnp.array([4, 1, 0]), jnp.array([[3], [0], [0]])
    _, cache = bench.read(bench.cache(), tokens[:, :3])
    logits, wanted = bench.read(cache, tokens[:, 3:], keep)
    assert bench.model.extend is not None
    out = bench.model.extend(bench.params, tokens[:, 3:], cache, keep, logits_at=places)
    chosen = jnp.take_along_axis(logits, places[..., None], 1)
    bench.same(out.logits, chosen, "extend gives other logits than apply")
    follow, _ = bench.read(out.cache, other[:, :2])
    bench.same(follow, bench.read(wanted, other[:, :2])[0], "extend keeps another text than apply and commit")


def _tree(bench: _Bench, tokens: Array, other: Array) -> None:
    """in a tree a token sees its ancestors alone, and commit along a path keeps that path"""
    # root 0 -> 1 -> 2 and 0 -> 3 -> 4: two branches side by side
    depths = jnp.array([0, 1, 2, 1, 2])
    visible = jnp.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], bool)
    _, cache = bench.read(bench.cache(), tokens[:, :2])
    left, right = tokens[:, 2:5], jnp.concatenate([tokens[:, 2:3], other[:, 3:5]], 1)
    block = jnp.concatenate([left, right[:, 1:]], 1)
    out = bench.apply(bench.params, block, cache, bench.block(5), depths=depths, visible=visible)
    plain_left, _ = bench.read(cache, left)
    plain_right, committed = bench.read(cache, right)
    bench.same(out.logits[:, :3], plain_left, "a tree's first branch is not that chain")
    bench.same(out.logits[:, 3:], plain_right[:, 1:], "a tree's second branch is not that chain")
    path = jnp.broadcast_to(jnp.array([0, 3, 4]), (_ROWS, 3))
    along = bench.commit(cache, out.block, jnp.full((_ROWS,), 3), path)
    bench.same(bench.read(along, other)[0], bench.read(committed, other)[0], "commit along a path kept something else")
