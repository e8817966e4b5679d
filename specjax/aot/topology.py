"""TPUs by name, described to the compiler by libtpu; no TPU is needed."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

GIB = 2**30
# Memory of a chip that programs may use, as the compiler says when it runs out of it (libtpu 0.0.52).
HBM_GIB = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
# Rate of main memory over clock, GB/s over GHz; the clocks are those that give the published peak rates.
_BYTES_PER_CYCLE = {"v5e": 819 / 1.5, "v5p": 2765 / 1.75, "v6e": 1638 / 1.75}
# Environment variables that libtpu needs on a machine without a TPU, before it loads. Only the command sets them.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
AXES = ("data", "model", "sub")
_NAME = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")
_EXAMPLES = {"v5e": "v5e:1x1 ... v5e:16x16", "v5p": "v5p:2x2x1 ... v5p:4x8x8", "v6e": "v6e:1x1 ... v6e:16x16"}
_MOST_CHIPS = 256


def hbm_bytes(topology: str) -> float:
    """Memory per chip that a program may use, in bytes. Raises ValueError for an unknown topology.

    >>> hbm_bytes("v5e:2x2") / GIB
    15.75
    """
    return HBM_GIB[_kind(topology)] * GIB


def bytes_per_cycle(topology: str) -> float:
    """Bytes that a chip's main memory moves in a cycle. Raises ValueError for an unknown topology.

    >>> bytes_per_cycle("v5e:2x2")
    546.0
    """
    return _BYTES_PER_CYCLE[_kind(topology)]


def num_chips(topology: str) -> int:
    """Chips of a topology. Raises ValueError for an unknown one.

    >>> num_chips("v5p:2x2x2")
    8
    """
    _kind(topology)
    return math.prod(int(side) for side in topology.split(":")[1].split("x"))


def default_axes(topology: str, *kv_heads: int) -> dict[str, int]:
    """All chips for the model: key/value heads over "model", what else can be cut over "model" and "sub" together.

    >>> default_axes("v5e:4x4", 8, 8)
    {'data': 1, 'model': 8, 'sub': 2}
    """
    chips = num_chips(topology)
    over_heads = math.gcd(chips, *kv_heads)
    return {"data": 1, "model": over_heads, "sub": chips // over_heads}


def make_mesh(topology: str, axes: dict[str, int]) -> Mesh:
    """A mesh of described chips, its axes in the order data, model, sub; those left out have size 1.

    Args:
      topology: "v5e:2x2", say.
      axes: size of each axis. Their product is the number of chips; or 1, for the first chip of the topology.

    Raises:
      ValueError: an unknown topology or axis, a product that is not the number of chips.
      ImportError: libtpu is missing or cannot be used.
    """
    chips = num_chips(topology)
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise ValueError(f"unknown mesh axis {unknown[0]!r}; known: {', '.join(AXES)} (as in data=1,model=4).")
    sizes = [axes.get(name, 1) for name in AXES]
    product = math.prod(sizes)
    if min(sizes) < 1 or product not in (1, chips):
        shown = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"the mesh {shown} has {product} chips and {topology} has {chips}: their product must be {chips} "
            "(or 1, for the first chip alone)."
        )
    return Mesh(np.array(_devices(topology)[:product]).reshape(sizes), AXES)


@functools.cache
def _devices(topology: str) -> list[Any]:
    # Once: a second description of the same topology holds devices that do not mix with those of the first.
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for TPUs needs their compiler, not a TPU: pip install libtpu (Linux, x86-64).")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, NotImplementedError, OSError) as error:
        if "INVALID_ARGUMENT" in str(error):
            raise ValueError(
                f"libtpu refuses the topology {topology}: {error}. Try v5e:2x2, v5e:4x4, "
                "v5p:2x2x1 or v5p:2x2x2, which are known to work."
            ) from error
        raise ImportError(
            f"libtpu cannot be used here ({error}). It needs the environment of specjax.aot.ENVIRONMENT, set before "
            "JAX is first used, and JAX_PLATFORMS=cpu; the command `specjax compile` sets both."
        ) from error


def _kind(topology: str) -> str:
    found = _NAME.fullmatch(topology)
    if found is None or found[1] not in HBM_GIB:
        raise ValueError(f"unknown topology {topology!r}; known: {'; '.join(_EXAMPLES.values())}.")
    chips = math.prod(int(side) for side in found[2].split("x"))
    if not 1 <= chips <= _MOST_CHIPS:
        raise ValueError(f"{topology} has {chips} chips: 1 to {_MOST_CHIPS} are supported.")
    return found[1]
