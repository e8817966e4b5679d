"""A kernel that JAX can differentiate and map: by the plain form, which computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def on_tpu(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` on TPU and `plain` elsewhere; under vmap, and when differentiated, `plain` everywhere.

    Every platform's form is traced on every platform, so what transforms one has to transform both.
    """

    @jax.custom_batching.custom_vmap
    def unmapped(*args: Any) -> Any:
        return kernel(*args)

    @unmapped.def_vmap
    def _(size: int, is_batched: Any, *args: Any) -> Any:
        axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched)
        out = jax.vmap(plain, tuple(axes), axis_size=size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def differentiable(*args: Any) -> Any:
        return unmapped(*args)

    @differentiable.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return jax.jvp(plain, primals, tangents)

    return lambda *args: lax.platform_dependent(*args, tpu=differentiable, default=plain)
