"""How fast this machine's memory and arithmetic are: a table of known accelerators, measured on any other device."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_READ_BYTES = 2**28  # past every last-level cache
_PRODUCT = 2048  # rows and columns of the matrices multiplied
_REPEATS = 7


class Machine(NamedTuple):
    """What one device can do at most."""

    name: str
    bandwidth: float  # bytes a second, from and to its main memory
    flops: float  # floating-point operations a second in the dtype asked for
    origin: str  # where the two numbers are from


class _Peak(NamedTuple):
    """A line of a data sheet, in 1e9 bytes and 1e12 operations a second, without sparsity."""

    bandwidth: float
    half: float  # bfloat16; float16 where a card has no bfloat16
    single: float  # float32 at full precision: CUDA cores; on TPUs six passes in bfloat16


# By `device_kind`, the longest name that it begins with. A jax device is half a chip on TPU v3 and 7x.
# TPUs: cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x} (chips; the same to 3% in jax's own pallas tpu_info.py).
# NVIDIA: the data sheets of the cards (nvidia.com/en-us/data-center/{a100,h100,h200,l4,l40s,tesla-t4}).
_KNOWN = {
    "TPU v3": _Peak(450, 61.5, 61.5 / 6),
    "TPU v4": _Peak(1228, 275, 275 / 6),
    "TPU v4 lite": _Peak(614, 138, 138 / 6),
    "TPU v5 lite": _Peak(819, 197, 197 / 6),
    "TPU v5e": _Peak(819, 197, 197 / 6),
    "TPU v5": _Peak(2765, 459, 459 / 6),  # v5p
    "TPU v6 lite": _Peak(1638, 918, 918 / 6),
    "TPU v6e": _Peak(1638, 918, 918 / 6),
    "TPU7x": _Peak(3690, 1153, 1153 / 6),
    "NVIDIA A100-SXM4-40GB": _Peak(1555, 312, 19.5),
    "NVIDIA A100-SXM4-80GB": _Peak(2039, 312, 19.5),
    "NVIDIA A100-PCIE-40GB": _Peak(1555, 312, 19.5),
    "NVIDIA A100 80GB PCIe": _Peak(1935, 312, 19.5),
    "NVIDIA H100 80GB HBM3": _Peak(3350, 989, 67),
    "NVIDIA H100 PCIe": _Peak(2000, 756, 51),
    "NVIDIA H200": _Peak(4800, 989, 67),
    "NVIDIA L4": _Peak(300, 121, 30.3),
    "NVIDIA L40S": _Peak(864, 362, 91.6),
    "Tesla T4": _Peak(320, 65, 8.1),
    "NVIDIA T4": _Peak(320, 65, 8.1),
    "Tesla V100-SXM2": _Peak(900, 125, 15.7),
}


def known(device_kind: str, dtype: Any) -> Machine | None:
    """The data sheet's numbers, or None for a device that is not in the table.

    Args:
      device_kind: as `jax.devices()[0].device_kind` says it.
      dtype: of the operands; float32 means full precision, as specjax multiplies.

    >>> known("NVIDIA H100 80GB HBM3", "bfloat16").bandwidth
    3350000000000.0
    >>> known("TPU v5 lite", "float32").name  # not TPU v5, which is another chip
    'TPU v5 lite'
    >>> known("cpu", "float32")
    """
    # A name that merely begins alike may be another card (an L40 is no L4), and a MIG slice is a part of one.
    fitting = [name for name in _KNOWN if f"{device_kind} ".startswith((f"{name} ", f"{name}-", f"{name}p"))]
    if not fitting or " MIG " in device_kind:
        return None
    peak = _KNOWN[max(fitting, key=len)]
    operations = peak.half if jnp.dtype(dtype).itemsize <= 2 else peak.single
    return Machine(device_kind, 1e9 * peak.bandwidth, 1e12 * operations, "data sheet")


def measured(dtype: Any) -> Machine:
    """Bandwidth and operations of the default device, measured on the spot in about two seconds.

    Bandwidth: the best of three ways of reading 256 MiB once (a sum, a sum of each row, a product with a vector), since
    no single one is the fastest everywhere. Operations: a product of two matrices of 2048 x 2048. The best of seven
    runs each: a limit is what the machine could do, undisturbed.
    """
    rows = _READ_BYTES // (4096 * jnp.dtype(dtype).itemsize)
    buffer, vector = jnp.ones((rows, 4096), dtype), jnp.ones((4096,), dtype)
    square = jnp.ones((_PRODUCT, _PRODUCT), dtype)
    reads = (lambda x, v: jnp.sum(x, dtype=jnp.float32), lambda x, v: jnp.sum(x, -1, dtype=jnp.float32), _dot)
    reading = min(_best(jax.jit(read), buffer, vector) for read in reads)
    multiplying = _best(jax.jit(_dot), square, square)
    name = jax.devices()[0].device_kind
    return Machine(name, buffer.nbytes / reading, 2 * _PRODUCT**3 / multiplying, "measured")


def this_machine(dtype: Any) -> Machine:
    """The default device: from the table where it is known, measured otherwise."""
    return known(jax.devices()[0].device_kind, dtype) or measured(dtype)


def _dot(left, right):
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precision)


def _best(run, *arguments) -> float:
    times = []
    for _ in range(_REPEATS + 1):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return min(times[1:])
