"""A kernel that JAX can differentiate and map: by the plain form, which computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir


def on_tpu(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` on TPU and `plain` elsewhere; under vmap, and when differentiated, `plain` everywhere.

    Every platform's form is traced on every platform, so what transforms one has to transform both.
    """

    @jax.custom_batching.custom_vmap
    def unmapped(*args: Any) -> Any:
        return _for_tpu_only(kernel, *args)

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


def _for_tpu_only(kernel: Callable[..., Any], *args: Any) -> Any:
    traced, shape = jax.make_jaxpr(kernel, return_shape=True)(*args)
    out = _tpu_only.bind(*jax.tree.leaves(args), kernel=traced)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


# Exported for TPU and CUDA at once, a branch of `platform_dependent` is lowered for both, and CUDA refuses TPU kernels.
_tpu_only = Primitive("tpu_only")
_tpu_only.multiple_results = True
_tpu_only.def_abstract_eval(lambda *_, kernel: kernel.out_avals)
_tpu_only.def_impl(lambda *args, kernel: jax.jit(jaxpr_as_fun(kernel))(*args))


def _lower(ctx: mlir.LoweringRuleContext, *args: Any, kernel: Any) -> Any:
    narrowed = ctx.replace(module_context=ctx.module_context.replace(platforms=("tpu",)), platforms=("tpu",))
    return mlir.lower_fun(jaxpr_as_fun(kernel), multiple_results=True)(narrowed, *args)


mlir.register_lowering(_tpu_only, _lower)
