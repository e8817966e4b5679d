"""Your Flax Linen module as a Model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen

from specjax.adapters.choose import Adapted, choose, count
from specjax.adapters.wrapped import Takes, cache_maker, check_shapes, mask_forms, wrap
from specjax.types import PyTree


def from_linen(
    module: linen.Module,
    variables: PyTree,
    *,
    takes: Takes | None = None,
    call: Callable[..., Any] | None = None,
    init_cache: Callable[[int, int], PyTree] | None = None,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    strategy: str | None = None,
) -> Adapted:
    """Makes a Model of someone else's Linen module, unmodified, with its own cache if that works.

    See `from_nnx` for how the strategy is chosen, and for the arguments that both functions take.

    Args:
      module: any causal language model.
      variables: what `module.init` returned, {"params": ...} and further collections that it reads.
      call: a function (module, variables, tokens, ...) to use in place of `module.apply(variables, ...)`.

    Returns:
      An Adapted, whose `.params` are these variables. Later variables of the same structure can be passed directly.

    Raises:
      ValueError: the module cannot be used; the message says why, and what to do.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> from specjax import adapters
    >>> class Counts(linen.Module):
    ...     @linen.compact
    ...     def __call__(self, tokens):
    ...         seen = jnp.cumsum(linen.Embed(8, 4)(tokens), axis=1)
    ...         return linen.Dense(8)(jnp.tanh(seen))
    >>> variables = Counts().init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    >>> adapters.from_linen(Counts(), variables).model.vocab_size
    8
    """
    if not isinstance(module, linen.Module):
        raise ValueError(
            f"module must be a flax.linen.Module, got {type(module).__name__}: pass an instance. "
            "For an NNX module use from_nnx(module)."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            "variables must be what module.init returned, a dict with 'params' in it; for the bare parameters pass "
            "{'params': params}."
        )
    vocab_size, max_positions = count(vocab_size, "vocab_size"), count(max_positions, "max_positions")

    def bind(params: PyTree) -> Callable[..., Any]:
        check_shapes(params, variables)
        if call is not None:
            return functools.partial(call, module, params)
        return functools.partial(module.apply, params)

    function = type(module).__call__ if call is None else call
    calls = mask_forms(function, takes, 1 if call is None else 2)  # less self, or module and variables
    maker = cache_maker(module, variables, init_cache, calls[0], strategy)
    forms = [wrap(function, bind, form, maker, max_positions) for form in calls]
    return choose(forms, variables, vocab_size=vocab_size, max_positions=max_positions, strategy=strategy)
