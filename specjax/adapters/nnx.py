"""Your Flax NNX module as a Model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from specjax.adapters.choose import Adapted, choose, count
from specjax.adapters.wrapped import CacheMaker, Takes, cache_maker, check_shapes, leaf_name, mask_forms, wrap
from specjax.types import PyTree

_RECIPE = (
    "call=, a function (module, tokens, ..., cache) that does nnx.update(module, cache) and returns (logits, "
    "nnx.state(module, nnx.Cache)), and init_cache=lambda batch, slots: nnx.state(a module made for so many, nnx.Cache)"
)


def from_nnx(
    module: nnx.Module,
    *,
    takes: Takes | None = None,
    call: Callable[..., Any] | None = None,
    init_cache: Callable[[int, int], PyTree] | None = None,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    strategy: str | None = None,
) -> Adapted:
    """Makes a Model of someone else's NNX module, unmodified, with its own cache if that works.

    The names of the module's arguments, or `takes`, say how to call it. Then it is tried on a few tokens: is it causal,
    are its rows independent, is dropout off, and does its cache give the logits of the whole text when rows have
    different lengths and drop tokens? Of the ways to use the cache, the first correct one is taken, the fastest first;
    the result says which, and why no faster one was taken. Without a usable cache every pass reads the whole text.

    Args:
      module: any causal language model; runs in evaluation mode (`module.eval()` of a copy).
      takes: which argument is what; None: guessed from names such as tokens, positions, cache, attention_mask.
      call: a function (module, tokens, ...) to use in place of `module(...)`; the names of its arguments are used, and
        it returns logits or (logits, cache). For caches in the module's own Variables.
      init_cache: (batch, slots) -> empty cache; None: the module's own `init_cache`, where it has one.
      vocab_size: ids that may be emitted; None: all columns of the logits.
      max_positions: the length of its table of positions, if it has one: no row gets longer. If the module takes no
        positions and has a cache, a round's draft tokens need positions too, and a larger `capacity` is an error.
      strategy: "per-row", "at-end", "row-by-row" or "uncached", to force one; it is still checked.

    Returns:
      An Adapted: `.model` and `.params` for generate, `.describe()` for you. In a training loop pass
      `nnx.state(module)`, or `nnx.state(module, nnx.Param)`, in place of `.params`: nothing is compiled anew. (With
      Params only, other variables such as batch statistics stay as they were when the module was adapted.)

    Raises:
      ValueError: the module cannot be used; the message says why, and what to do.

    >>> import jax, jax.numpy as jnp, specjax
    >>> from flax import nnx
    >>> from specjax import adapters
    >>> class Bigram(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.table, self.out = nnx.Embed(8, 4, rngs=rngs), nnx.Linear(4, 8, rngs=rngs)
    ...     def __call__(self, tokens):
    ...         seen = jnp.cumsum(self.table(tokens), axis=1)
    ...         return self.out(jnp.tanh(seen))
    >>> target = adapters.from_nnx(Bigram(nnx.Rngs(0)))
    >>> print(target.describe().split(":")[0])
    Runs without a cache
    >>> draft = specjax.drafters.draft_model(target.model)
    >>> out = specjax.generate(target.model, target.params, draft, target.params, jnp.array([[1, 2]]), max_new_tokens=4)
    >>> out.new_tokens() == specjax.autoregressive(
    ...     target.model, target.params, jnp.array([[1, 2]]), max_new_tokens=4
    ... ).new_tokens()
    True
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"module must be a flax.nnx.Module, got {type(module).__name__}: pass an instance. "
            "For a Linen module use from_linen(module, variables)."
        )
    vocab_size, max_positions = count(vocab_size, "vocab_size"), count(max_positions, "max_positions")
    graph, trained, rest = nnx.split(module, nnx.Param, ...)
    state = nnx.state(module)
    # By the number of arrays in the parameters, the state to add to them: the caller may pass the Params or everything.
    lacking = {len(jax.tree.leaves(trained)): (rest,), len(jax.tree.leaves(state)): ()}

    def bind(params: PyTree) -> Callable[..., Any]:
        if isinstance(params, nnx.Module):
            raise ValueError(f"params is a {type(params).__name__}, a module: pass its state, nnx.state(module).")
        count = len(jax.tree.leaves(params))
        if count not in lacking:
            raise ValueError(
                f"these parameters have {count} arrays, the module has {' or '.join(map(str, lacking))}: pass "
                "nnx.state(module) or nnx.state(module, nnx.Param) of the module that was adapted."
            )
        check_shapes(params, trained if lacking[count] else state)
        # New Variables: the given ones may belong to another trace.
        copy: Any = nnx.merge(graph, params, *lacking[count], copy=True)
        copy.eval()
        return copy if call is None else functools.partial(call, copy)

    function = type(module).__call__ if call is None else call
    forms_of_mask = mask_forms(function, takes)
    maker = cache_maker(module, state, init_cache, forms_of_mask[0], strategy)
    maker = maker._replace(note=_about_variables(module, maker) or maker.note)
    calls = [wrap(function, bind, form, maker, max_positions) for form in forms_of_mask]
    return choose(calls, state, vocab_size=vocab_size, max_positions=max_positions, strategy=strategy)


def _about_variables(module: nnx.Module, maker: CacheMaker) -> str | None:
    """A sentence about what to do with a cache in the module's own Variables; None if there is no problem."""
    if maker.make is None:
        own = _names(nnx.state(module, nnx.Cache))
        what = f"It keeps a cache in its own Variables ({_few(own)}), and every pass begins with it as it is now:"
        return f"{what} pass {_RECIPE}." if own else None
    try:
        cache = jax.eval_shape(functools.partial(maker.make, 1, 2))
    except Exception:  # the error of someone else's function is reported where its cache is used
        return None
    own_names = set(_names(nnx.state(module)))
    lacking = [name for name in _names(cache) if name not in own_names]
    if not isinstance(cache, nnx.State) or not lacking:
        return None
    return (
        f"Its init_cache gives Variables that the module does not hold ({_few(lacking)}): adapt a module that already "
        f"holds them, for one row and one slot if you like, and pass {_RECIPE}."
    )


def _names(state: PyTree) -> list[str]:
    return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]


def _few(names: list[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
