"""Someone else's module as one pure function: how it takes tokens, positions, cache and mask, and what it returns."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.types import Array, PyTree

TRIED = 32  # tokens of the longest text and slots of the largest cache that a module is run on when it is adapted

# Argument names that common Flax modules use; `Takes` is for all others.
_POSITIONS = ("positions", "position_ids", "segment_pos", "segment_positions", "position", "pos")
_CACHE = ("cache", "kv_cache", "kv_caches", "caches", "past_key_values", "past", "layer_caches")
_MASK = ("attention_mask", "mask", "attn_mask", "attention_masks")
_FIXED = {"deterministic": True, "train": False, "training": False, "is_training": False, "return_last_only": False}
_BATCH = ("batch_size", "batch", "rows")
_SLOTS = (
    "cache_size",
    "cache_length",
    "cache_len",
    "max_seq_len",
    "max_length",
    "max_len",
    "length",
    "slots",
    "capacity",
)
NO_CACHE = (
    "It takes no cache: no argument of its call is named for one "
    "(takes=adapters.Takes(tokens=..., cache=...) names it)."
)
_UNTOLD = (
    "The argument names of its init_cache{} do not say which are rows and slots, so it is not used: pass "
    "init_cache=lambda batch, slots: module.init_cache(...)."
)


def per_head(visible: Array) -> Array:
    """A mask [B, 1, T, S], as Flax's own attention layers take it; for `Takes.mask_form`."""
    return visible[:, None]


def as_given(visible: Array) -> Array:
    """A mask [B, T, S] of bool, true where attention may look; for `Takes.mask_form`."""
    return visible


class Takes(NamedTuple):
    """The names of the arguments by which a module takes its inputs; None: it has no such argument."""

    tokens: str  # [B, T] int32
    positions: str | None = None  # [B, T] int32, the place of each token in its row's text
    cache: str | None = None  # a cache as its init_cache makes it
    mask: str | None = None  # which slots of the cache (or tokens, without one) each token sees
    mask_form: Callable[[Array], Array] = as_given  # from [B, T, S] bool to the form that the module needs
    fixed: Mapping[str, Any] = {}  # arguments that are always the same: {"deterministic": True}

    def describe(self) -> str:
        """The call, in words: "tokens=, cache=, deterministic=True"."""
        named = (self.tokens, self.positions, self.cache, self.mask)
        return ", ".join([f"{name}=" for name in named if name] + [f"{name}={x!r}" for name, x in self.fixed.items()])


class PassInput(NamedTuple):
    """The inputs of one pass."""

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32
    visible: Array  # [B, T, S] bool, over the cache's slots or, without a cache, over the T tokens
    cache: PyTree = None


class NoLogits(ValueError):
    """A module was called, and its result holds no logits."""


class PassOutput(NamedTuple):
    """The result of one pass."""

    logits: Array  # [B, T, columns]
    cache: PyTree


class CacheMaker(NamedTuple):
    """How a module's empty cache is made."""

    make: Callable[[int, int], PyTree] | None  # (batch, slots) -> empty cache; None: there is no way to make one
    note: str = ""  # a sentence: why there is none, or what the module lacks, and what to do


class Wrapped(NamedTuple):
    """A module as functions, for the strategies of this package."""

    run: Callable[[PyTree, PassInput], PassOutput]  # (params, feed)
    cache: CacheMaker
    takes: Takes

    @property
    def init_cache(self) -> Callable[[int, int], PyTree] | None:
        """(batch, slots) -> empty cache; None: there is none."""
        return self.cache.make

    @property
    def sees_trees(self) -> bool:
        """Whether the caller can set which tokens of a round each token sees."""
        return self.takes.positions is not None and self.takes.mask is not None


def wrap(
    function: Callable[..., Any],
    bind: Callable[[PyTree], Callable[..., Any]],
    takes: Takes,
    cache: CacheMaker,
    max_positions: int | None,
) -> Wrapped:
    """Wraps the call of a module, `bind(params)`, which has the signature of `function`."""
    known = set(inspect.signature(function).parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    for role in ("tokens", "positions", "cache", "mask"):
        name = getattr(takes, role)
        if name is not None and name not in known and not open_ended:
            raise ValueError(f"takes.{role} is {name!r}, but the module takes {', '.join(sorted(known)) or 'nothing'}.")

    def run(params: PyTree, feed: PassInput) -> PassOutput:
        named = {
            takes.tokens: feed.tokens,
            takes.positions: feed.positions,
            takes.cache: feed.cache,
            takes.mask: takes.mask_form(feed.visible),
        }
        named.pop(None, None)
        bound = bind(params)
        with named_when_longer(feed.visible.shape[-1], max_positions):
            out = bound(**named, **takes.fixed)
        return unpack(out, feed.tokens.shape)

    return Wrapped(run, cache, takes)


@contextlib.contextmanager
def named_when_longer(size: int, max_positions: int | None) -> Iterator[None]:
    """Explains errors that a module raises at more places than it was tried at, and says which argument to pass.

    Such errors are mostly about shapes (a table of positions that is added by a slice). Without this explanation they
    would name an addition somewhere in the module, while `generate` is traced.
    """
    try:
        yield
    except Exception as error:  # any error of someone else's module
        if size <= TRIED:
            raise  # the trial handles it
        cure = "If its positions end somewhere, pass max_positions= (how many it has) to from_nnx or from_linen."
        if max_positions is not None and size > max_positions:
            cure = f"It has max_positions={max_positions}: make capacity smaller by {size - max_positions}."
        elif max_positions is not None:
            cure = f"If its positions end before {max_positions}, pass max_positions= as it is."
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the module failed at {size} places (the capacity, and a round past it), where it was tried at up to "
            f"{TRIED}. {cure} It said: {said}"
        ) from error


def guess_takes(function: Callable[..., Any], bound: int) -> Takes:
    """Takes guessed from the argument names of a signature, without its first `bound` ones.

    Raises ValueError if the signature has a required argument that specjax cannot fill.
    """
    parameters = list(inspect.signature(function).parameters.values())[bound:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not named:
        raise ValueError(
            f"the module is called with {inspect.signature(function)}, which names no argument: pass "
            "takes=adapters.Takes(tokens=..., positions=..., cache=..., mask=...), None for what it does not take."
        )

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in named), None)

    takes = Takes(
        tokens=next(iter(named)), positions=first(_POSITIONS), cache=first(_CACHE), mask=first(_MASK),
        fixed={name: value for name, value in _FIXED.items() if name in named},
    )  # fmt: skip
    filled = {takes.tokens, takes.positions, takes.cache, takes.mask, *takes.fixed}
    left = [name for name, p in named.items() if p.default is p.empty and name not in filled]
    if left:
        raise ValueError(
            f"the module also wants {', '.join(left)}: pass takes=adapters.Takes(tokens={takes.tokens!r}, ..., "
            f"fixed={{{left[0]!r}: ...}}) with the value to use in every pass."
        )
    return takes


def mask_forms(function: Callable[..., Any], takes: Takes | None, bound: int = 1) -> list[Takes]:
    """The given Takes; or the guessed ones, one for each of the two forms of masks, which only a trial tells apart."""
    if takes is not None:
        return [takes]
    guess = guess_takes(function, bound)
    return [guess] if guess.mask is None else [guess, guess._replace(mask_form=per_head)]


def cache_maker(
    module: Any,
    params: PyTree,
    given: Callable[[int, int], PyTree] | None,
    takes: Takes,
    strategy: str | None,
) -> CacheMaker:
    """The given function, or the module's own `init_cache`, if the names of its arguments say what they are."""
    if takes.cache is None:
        if given is not None and strategy != "uncached":  # "uncached" ignores init_cache
            raise ValueError(
                "init_cache is given, but no argument of the module's call is named for a cache: pass "
                "takes=adapters.Takes(tokens=..., cache=..., ...) with the name it has."
            )
        return CacheMaker(None, NO_CACHE)
    if given is not None:
        return CacheMaker(given)
    method = getattr(module, "init_cache", None)
    if method is None:
        return CacheMaker(
            None,
            f"It takes a cache ({takes.cache}), but has no init_cache: pass init_cache=lambda batch, slots: ...",
        )
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # a number with that name, or a function without a signature
        return CacheMaker(None, _UNTOLD.format(""))
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    batch_name = next((name for name in _BATCH if name in named), None)
    slots_name = next((name for name in _SLOTS if name in named), None)
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    asked = [name for name, p in parameters.items() if p.default is p.empty and p.kind not in open_ended]
    left = [name for name in asked if name not in (batch_name, slots_name, "dtype")]
    if batch_name is None or slots_name is None or left:
        return CacheMaker(None, _UNTOLD.format(f"({', '.join(map(str, parameters.values()))})"))
    floats = (leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating))
    extra = {"dtype": next(floats, jnp.float32)} if "dtype" in named else {}
    return CacheMaker(lambda batch, slots: method(**{batch_name: batch, slots_name: slots}, **extra))


def check_shapes(params: PyTree, adapted: PyTree) -> None:
    """Raises ValueError for parameters of another module of the same kind."""
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(adapted), jax.tree.leaves(params), strict=False
    ):
        if jnp.shape(ours) != jnp.shape(theirs):
            raise ValueError(
                f"these parameters are another module's: {leaf_name(path)} is {list(jnp.shape(theirs))}, where the "
                f"module that was adapted has {list(jnp.shape(ours))}."
            )


def leaf_name(path: tuple[Any, ...]) -> str:
    """The path of an array in a module's state: "layers.0.kernel"."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path).strip(".")


def unpack(out: Any, shape: tuple[int, ...]) -> PassOutput:
    """Logits and cache, in whatever form: an array, a pair in either order, an object with `.logits` and `.cache`."""
    if hasattr(out, "logits"):
        return PassOutput(out.logits, getattr(out, "cache", None))
    if isinstance(out, Mapping) and "logits" in out:
        return PassOutput(out["logits"], out.get("cache"))
    parts: list[Any] = list(out) if isinstance(out, (tuple, list)) else [out]
    for index, part in enumerate(parts):
        if getattr(part, "ndim", 0) == 3 and part.shape[:2] == shape and jnp.issubdtype(part.dtype, jnp.floating):
            others = parts[:index] + parts[index + 1 :]
            return PassOutput(part, others[0] if others else None)
    found = ", ".join(str(jax.tree.map(jnp.shape, part)) for part in parts)
    raise NoLogits(
        f"the module returned no logits: expected an array [B, T, V] = [{shape[0]}, {shape[1]}, V], alone, in a pair "
        f"with the cache, or as .logits; got {found}. Pass call=, a function of your own that returns (logits, cache)."
    )
