"""How a model is placed on a mesh of devices: which mesh axes split its rows, heads, widths and vocabulary.

A `Layout` is a field of `Model`: `models.load(path, layout=layout(mesh))` places the parameters by rules on their
paths, and every loop that uses that model places its caches, rows and logits as the layout says. Logits stay split over
the vocabulary from the last matrix product to the sampled token.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import integers

_log = logging.getLogger(__name__)

# What splits a dimension: the name of a field of Layout, or None for no split.
Role: TypeAlias = str | None
# (regular expression on the parameter's path, role of each leading dimension); the first that matches counts.
Rules: TypeAlias = Sequence[tuple[str, tuple[Role, ...]]]


class Layout(NamedTuple):
    """Mesh axes, by the dimension that they split; hashable.

    A dimension whose size its axes do not divide is split over fewer of them, or over none.
    """

    mesh: Mesh
    rows: tuple[str, ...] = ()  # the batch
    width: tuple[str, ...] = ()  # MLPs and the vocabulary
    heads: tuple[str, ...] = ()  # key/value heads, and with them the caches
    query: tuple[str, ...] = ()  # query heads


def layout(mesh: Mesh, *, rows: Sequence[str] = ("data",), width: Sequence[str] = ("model", "sub")) -> Layout:
    """The layout of a mesh: it splits the batch over `rows`, and the dimensions inside a model over `width`.

    Axes that the mesh lacks are left out, so a mesh of ("model",) is tensor-parallel, one of ("data",) data-parallel,
    one of ("data", "model") both. `width=()` keeps a model whole on every device: for a small draft model, which
    then needs no communication at all. "sub" splits further where there are fewer key/value heads than devices: with 8
    heads on 16 devices, a mesh of model=8, sub=2 keeps one head on each pair.

    Raises:
      ValueError: the mesh has an axis that splits nothing.

    >>> layout(make_mesh(model=1)).width
    ('model',)
    """
    known = {*rows, *width, "data", "model", "sub"}
    idle = [name for name in mesh.axis_names if name not in known and mesh.shape[name] > 1]
    if idle:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, and nothing is cut over {', '.join(map(repr, idle))}: name them "
            'in rows= or width=, as in layout(mesh, rows=("batch",), width=("tensor",)).'
        )
    # Axes of type Auto, whatever the caller's mesh has: specjax sets the shardings that matter, XLA chooses the others.
    automatic = Mesh(mesh.devices, mesh.axis_names)
    present = [tuple(name for name in names if name in mesh.axis_names) for names in (rows, width)]
    return Layout(automatic, *present, heads=present[1], query=present[1])


def make_mesh(*, data: int = 1, model: int = 1, sub: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first data * model * sub devices, neighbours along `sub`, then `model`.

    Raises:
      ValueError: a size below 1, or fewer devices than that.

    >>> make_mesh(data=1).axis_names
    ('data', 'model')
    """
    devices = jax.devices() if devices is None else list(devices)
    data, model, sub = (integers.static(size, name) for name, size in (("data", data), ("model", model), ("sub", sub)))
    wanted = data * model * sub
    if wanted > len(devices):
        raise ValueError(
            f"a mesh of data={data}, model={model}, sub={sub} needs {wanted} devices, there are {len(devices)}. "
            "On a CPU jax.config.update('jax_num_cpu_devices', n) simulates n, before anything runs."
        )
    shape, names = [data, model], ["data", "model"]
    if sub > 1:
        shape, names = [*shape, sub], [*names, "sub"]
    return Mesh(np.array(devices[:wanted]).reshape(shape), tuple(names))


def fit(given: Layout | None, *, heads: int, query_heads: int) -> Layout | None:
    """The layout with attention split by whole heads, each query head on the same device as its key head."""
    if given is None:
        return None
    by_heads = _dividing(given.mesh, given.width, heads)
    by_query = _dividing(given.mesh, given.width, query_heads)
    # Queries may be split further than keys only if each device has one key head, to which all its queries belong.
    one_each = heads == _size(given.mesh, by_heads)
    is_further = by_query[: len(by_heads)] == by_heads
    if by_heads != given.width:
        _log.info("%d key/value heads are cut over %s of the mesh axes %s", heads, by_heads or "none", given.width)
    return given._replace(heads=by_heads, query=by_query if one_each and is_further else by_heads)


def spec(given: Layout, roles: Sequence[Role], shape: Sequence[int]) -> PartitionSpec:
    """The partition of an array: its leading dimensions by role, the others whole."""
    axes = [
        () if role is None else _dividing(given.mesh, getattr(given, role), size)
        for role, size in zip(roles, shape, strict=False)
    ]
    return PartitionSpec(*(names or None for names in axes))


def constrain(given: Layout | None, tree: Any, *roles: Role) -> Any:
    """The arrays of `tree`, sharded as their roles say; unchanged without a layout."""
    if given is None:
        return tree

    def one(leaf: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(given.mesh, spec(given, roles, leaf.shape)))

    return jax.tree.map(one, tree)


def on_each(given: Layout | None, run: Callable[..., Any], in_roles: Any, out_roles: Any) -> Callable[..., Any]:
    """`run` on every device's own part of its arguments; `run` itself without a layout.

    For work in which no device needs another's data: because of per-row indices, XLA would move rows between devices.

    Args:
      given: the layout.
      run: takes and returns pytrees of arrays.
      in_roles: for each argument the roles of its arrays' dimensions.
      out_roles: of the result's.
    """
    if given is None:
        return run

    def specs(roles: tuple[Role, ...], tree: Any) -> Any:
        return jax.tree.map(lambda leaf: spec(given, roles, leaf.shape), tree)

    def mapped(*args: Any) -> Any:
        result = jax.eval_shape(run, *args)
        return jax.shard_map(
            run,
            mesh=given.mesh,
            in_specs=tuple(specs(roles, arg) for roles, arg in zip(in_roles, args, strict=True)),
            out_specs=specs(out_roles, result),
            check_vma=False,
        )(*args)

    return mapped


def param_sharding(given: Layout, rules: Rules, name: str, shape: Sequence[int]) -> NamedSharding:
    """Where the parameter of this path and shape lies; whole on every device where no rule matches."""
    roles = next((roles for pattern, roles in rules if re.search(pattern, name)), ())
    unknown = [role for role in roles if role is not None and role not in Layout._fields[1:]]
    if unknown:
        raise ValueError(f"sharding rules know the roles {', '.join(Layout._fields[1:])}, got {unknown[0]!r}.")
    return NamedSharding(given.mesh, spec(given, roles, shape))


def check_batch(given: Layout | None, batch: int) -> None:
    """Refuses a batch that the rows' axes do not divide: every device must have as many."""
    if given is not None and batch % _size(given.mesh, given.rows):
        raise ValueError(
            f"{batch} row{'s' * (batch > 1)} of prompts cannot be divided over {_size(given.mesh, given.rows)} devices "
            f"({', '.join(given.rows)}): fill the batch up, with max_new_tokens=1 for rows that only fill."
        )


def globally(given: Layout | None, tree: Any) -> Any:
    """Host values as arrays on every device of the mesh. With several processes, each must pass the same values.

    Traced values, and arrays that already lie on several devices, stay as they are.
    """
    if given is None:
        return tree
    whole = NamedSharding(given.mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        if isinstance(leaf, Tracer) or len(leaf.sharding.device_set) > 1:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, whole, lambda index: host[index])

    return jax.tree.map(place, tree)


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The most leading axes that divide `size`."""
    for count in range(len(axes), 0, -1):
        if size % _size(mesh, axes[:count]) == 0:
            return axes[:count]
    return ()


def _size(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in axes)
