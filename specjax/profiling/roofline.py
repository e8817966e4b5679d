"""What one forward pass cannot avoid: bytes through memory and floating-point operations, counted for any Model.

Nothing is guessed from names. Which parameters are multiplied and which are only looked up, and how many products a
pass makes, is read from the traced program; what a cached token costs, from the cache's shapes at two capacities. So
the counts hold for a model of your own too, up to four things: layers in a `while_loop` of unknown length count once,
each expert of a mixture counts as used, a sliding window counts as if it saw the whole live text, and activations, a
few rows wide, count as free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, Var

from specjax.profiling.machine import Machine
from specjax.types import Model, PyTree

# The leaf reaches these operations' results unchanged: what matters is who reads those.
_VIEWS = {
    "convert_element_type", "copy", "optimization_barrier", "reshape", "sharding_constraint", "squeeze", "transpose",
}  # fmt: skip
_APART = 4096  # slots between the two capacities at which a cache is looked at, a multiple of what caches round to


class Work(NamedTuple):
    """What a computation cannot avoid."""

    bytes: float  # read from memory or written to it
    flops: float  # a multiplication and an addition are two


def count(model: Model, params: PyTree, *, batch: int, tokens: int, live: float, logits: int | None = None) -> Work:
    """The work of one forward pass over `tokens` new tokens a row, and of keeping them.

    Parameters that are multiplied or added are read once; a table that is only looked up (the embedding of a model
    whose output layer is another) is read where it is looked up; the live part of the cache is read once, the new
    tokens are written to it, and the logits are written once, in float32. Nothing runs: parameters may be abstract.

    Args:
      model: any Model.
      params: its parameters, or `jax.ShapeDtypeStruct`s of them.
      batch: rows.
      tokens: new tokens of each row.
      live: tokens of each row in the cache before, an average if they differ.
      logits: places of each row whose logits are computed; None is all of `tokens`.

    Returns:
      Work: bytes, and floating-point operations (weights and attention; what is elementwise counts as free).

    >>> import jax
    >>> from specjax import models
    >>> from specjax.profiling import roofline
    >>> config = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16,
    ...           "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    >>> tiny = models.random(config, jax.random.key(0))
    >>> roofline.count(tiny.model, tiny.params, batch=1, tokens=1, live=10)
    Work(bytes=3940.0, flops=1888.0)
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    leaves = jax.tree.leaves(abstract)
    # Two capacities that no cache rounds up, with room for what is live.
    slots = _APART * (1 + math.ceil((live + tokens) / _APART))
    near, far = (_trace(model, abstract, batch, tokens, logits, size) for size in (slots, slots + _APART))
    bytes_per_token = (far.cache_bytes - near.cache_bytes) / _APART
    flops_per_token = (far.reading.other_flops - near.reading.other_flops) / _APART
    looked_up = near.reading.looked_up
    weights = sum(
        _num_bytes(leaf) if index in near.reading.whole
        else min(_num_bytes(leaf), looked_up.get(index, 0) * jnp.dtype(leaf.dtype).itemsize)
        for index, leaf in enumerate(leaves)
    )  # fmt: skip
    cached = near.cache_bytes + bytes_per_token * (live + tokens - slots)
    attention = near.reading.other_flops + flops_per_token * (live - slots)
    return Work(float(weights + cached + near.logits_bytes), float(near.reading.weight_flops + attention))


def step(model: Model, params: PyTree, *, batch: int, live: float) -> list[Work]:
    """The passes of one autoregressive step: one."""
    return [count(model, params, batch=batch, tokens=1, live=live)]


def speculation(
    model: Model, params: PyTree, draft: Model, draft_params: PyTree, *, batch: int, live: float, draft_len: int
) -> list[Work]:
    """The passes of one speculation round with a draft model: K of the draft, the first of them over two tokens; then
    one of the target over K + 1 tokens.

    Arguments as for `count`; `live` is that of both caches before the round.
    """
    first = count(draft, draft_params, batch=batch, tokens=2, live=live, logits=1)
    more = [count(draft, draft_params, batch=batch, tokens=1, live=live + 1)] * (draft_len - 1)
    return [first, *more, count(model, params, batch=batch, tokens=draft_len + 1, live=live)]


def total(passes: Iterable[Work]) -> Work:
    """All of them together.

    >>> total([Work(1.0, 2.0), Work(10.0, 20.0)])
    Work(bytes=11.0, flops=22.0)
    """
    bytes_, flops = (math.fsum(counts) for counts in zip(*passes, strict=True))
    return Work(bytes_, flops)


def seconds(passes: Sequence[Work], machine: Machine) -> float:
    """The least time that `machine` needs for these passes, one after the other: each takes as long as its bytes or
    its operations do, whichever is longer. No real program reaches it.

    >>> from specjax.profiling.machine import Machine
    >>> seconds([Work(100.0, 1.0), Work(1.0, 100.0)], Machine("a machine", 50.0, 25.0, "made up"))
    6.0
    """
    return math.fsum(max(work.bytes / machine.bandwidth, work.flops / machine.flops) for work in passes)


class _Reading(NamedTuple):
    """What a traced program does with its parameters."""

    whole: frozenset[int]  # parameters that something other than a lookup reads
    looked_up: dict[int, float]  # elements looked up in a parameter
    weight_flops: float  # products with a parameter
    other_flops: float  # products of data with data: attention


def _read(jaxpr: Jaxpr, views: dict[Var, int], constants: set[Var]) -> _Reading:
    """Walks a program and those inside it.

    Args:
      jaxpr: the program.
      views: of its variables, those that are a parameter, reshaped or cast; and which.
      constants: those that follow from parameters alone, dequantised weights among them.
    """
    views, constants = dict(views), constants | set(jaxpr.constvars)
    found = []
    for eqn in jaxpr.eqns:
        inputs = [None if isinstance(atom, Literal) else atom for atom in eqn.invars]
        read = frozenset(views[var] for var in inputs if var in views)
        name = eqn.primitive.name
        inner = [_read_inside(part, views, constants) for part in _inside(eqn, inputs)]
        if inner:
            platforms = eqn.params.get("branches_platforms") or ()
            if None in platforms:  # lax.platform_dependent: the form that all platforms but a few have
                inner = [inner[platforms.index(None)]]
            found.append(_either(inner) if name == "cond" else _together(inner))
        elif name in _VIEWS:
            views |= {new: views[old] for old, new in zip(inputs, eqn.outvars, strict=True) if old in views}
        elif name == "gather" and inputs[0] in views:
            found.append(_Reading(read - {views[inputs[0]]}, {views[inputs[0]]: _size(eqn.outvars[0].aval)}, 0, 0))
        elif name == "dot_general":
            flops, is_weight = _dot_flops(eqn), any(var in constants for var in inputs)
            found.append(_Reading(read, {}, flops if is_weight else 0, 0 if is_weight else flops))
        else:
            found.append(_Reading(read, {}, 0, 0))
        if all(var is None or var in constants for var in inputs):
            constants |= set(eqn.outvars)
    # Who reads a parameter that an inner program hands back is not followed: it counts as read.
    returned = frozenset(views[var] for var in jaxpr.outvars if not isinstance(var, Literal) and var in views)
    return _together([*found, _Reading(returned, {}, 0, 0)])


def _together(parts: Sequence[_Reading]) -> _Reading:
    """All of these run."""
    looked_up: dict[int, float] = {}
    for part in parts:
        for index, size in part.looked_up.items():
            looked_up[index] = looked_up.get(index, 0) + size
    return _Reading(
        frozenset().union(*(part.whole for part in parts)), looked_up, sum(part.weight_flops for part in parts),
        sum(part.other_flops for part in parts),
    )  # fmt: skip


def _either(parts: Sequence[_Reading]) -> _Reading:
    """One of these runs: weights by the cheapest branch, attention by the dearest (the longest prefix of the cache)."""
    most = {index: max(part.looked_up.get(index, 0) for part in parts) for part in parts for index in part.looked_up}
    return _Reading(
        frozenset().union(*(part.whole for part in parts)), most, min(part.weight_flops for part in parts),
        max(part.other_flops for part in parts),
    )  # fmt: skip


class _Inner(NamedTuple):
    """A program inside an operation."""

    jaxpr: Jaxpr
    times: int  # how often it runs
    inputs: list[Var | None]  # the outer variables that are its inputs; None for a literal


def _inside(eqn: Any, inputs: list[Var | None]) -> list[_Inner]:
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    found = []
    for key, value in eqn.params.items():
        for part in value if isinstance(value, tuple | list) else (value,):
            jaxpr, given = getattr(part, "jaxpr", part), inputs
            if not isinstance(jaxpr, Jaxpr):
                continue
            if eqn.primitive.name == "while":  # condition's constants, body's constants, carry
                first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
                own = inputs[:first] if key == "cond_jaxpr" else inputs[first : first + second]
                given = own + inputs[first + second :]
            # What an operation takes besides its program's inputs comes first: the index of a branch.
            found.append(_Inner(jaxpr, times, given[len(given) - len(jaxpr.invars) :]))
    return found


def _read_inside(inner: _Inner, views: dict[Var, int], constants: set[Var]) -> _Reading:
    pairs = list(zip(inner.inputs, inner.jaxpr.invars, strict=True))
    found = _read(
        inner.jaxpr,
        {new: views[old] for old, new in pairs if old in views},
        {new for old, new in pairs if old is None or old in constants},
    )
    looked_up = {index: inner.times * size for index, size in found.looked_up.items()}
    return _Reading(found.whole, looked_up, inner.times * found.weight_flops, inner.times * found.other_flops)


class _Trace(NamedTuple):
    """One pass, traced with a cache of some capacity."""

    reading: _Reading
    cache_bytes: int
    logits_bytes: int


def _trace(model: Model, params: PyTree, batch: int, tokens: int, logits: int | None, slots: int) -> _Trace:
    cache = jax.eval_shape(lambda params: model.init_cache(params, batch, slots), params)
    block = jax.eval_shape(lambda params: model.init_block(params, batch, tokens), params)
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    places = None if logits is None else jax.ShapeDtypeStruct((batch, logits), jnp.int32)

    def forward(params, ids, cache, block, places):
        return model.apply(params, ids, cache, block, logits_at=places).logits

    closed, out = jax.make_jaxpr(forward, return_shape=True)(params, ids, cache, block, places)
    views = dict(zip(closed.jaxpr.invars, range(len(jax.tree.leaves(params))), strict=False))
    reading = _read(closed.jaxpr, views, set(views))
    return _Trace(reading, sum(map(_num_bytes, jax.tree.leaves(cache))), _num_bytes(out))


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * _size(eqn.outvars[0].aval) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape)


def _num_bytes(leaf: Any) -> int:
    return _size(leaf) * jnp.dtype(leaf.dtype).itemsize
