"""Makes a kernel differentiable and mappable: JAX transforms a plain form, which computes the same."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir


def on_tpu(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` on TPU and `plain` elsewhere; under vmap, and when differentiated, `plain` everywhere.

    JAX traces the forms of all platforms on every platform, so a transformation has to work on both forms. The kernel
    itself is traced only when lowering for TPU: tracing it takes long, and other platforms do not need it.

    With SPECJAX_TPU_KERNELS=0 in the environment, `plain` everywhere: a fallback until the kernels have run on TPUs.
    """
    if os.environ.get("SPECJAX_TPU_KERNELS") == "0":
        return plain

    @jax.custom_batching.custom_vmap
    def unmapped(*args: Any) -> Any:
        shapes = jax.eval_shape(plain, *args)
        leaves, given = jax.tree.flatten(args)
        avals = tuple(ShapedArray(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes))
        out = _kernel.bind(*leaves, kernel=kernel, given=given, avals=avals)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

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


def _run(*leaves: Any, kernel: Callable[..., Any], given: Any, avals: Any) -> list[Any]:
    return jax.tree.leaves(kernel(*jax.tree.unflatten(given, leaves)))


def _lower(ctx: mlir.LoweringRuleContext, *leaves: Any, **params: Any) -> Any:
    # An export for TPU and CUDA together lowers this branch for both, and CUDA refuses TPU kernels.
    narrowed = ctx.replace(module_context=ctx.module_context.replace(platforms=("tpu",)), platforms=("tpu",))
    return mlir.lower_fun(functools.partial(_run, **params), multiple_results=True)(narrowed, *leaves)


_kernel = Primitive("tpu_kernel")
_kernel.multiple_results = True
_kernel.def_abstract_eval(lambda *_, avals, **params: avals)
_kernel.def_impl(lambda *leaves, **params: jax.jit(functools.partial(_run, **params))(*leaves))
mlir.register_lowering(_kernel, _lower)
