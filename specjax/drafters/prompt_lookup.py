"""Drafts what followed the last time: the end of the row's text, found earlier in the same text."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from specjax import integers
from specjax.drafters.matches import continuations, find_matches, most_frequent
from specjax.types import Context, Draft, Drafter, DraftPlan, PyTree

_MOST = 64  # tokens that are compared
_CANDIDATES = 16  # recent matches that "frequent" counts


def prompt_lookup(*, n_min: int = 2, n_max: int = 8, pick: Literal["recent", "frequent"] = "recent") -> Drafter:
    """Drafts from the row's own text, prompt and output: no draft model, no parameters (drafter_params is `()`).

    The longest suffix of the text that occurred before is found, n_max tokens down to n_min, and what followed it is
    the draft. A draft longer than the text that followed goes on periodically. A row without a match has no draft, and
    a round in which no row has one is a plain step, with every controller. The draft's distribution is one-hot, so
    every verifier is exact with it.

    Args:
      n_min: tokens that must match, 1 or more. Fewer find more and err more.
      n_max: tokens that are compared, n_min..64.
      pick: of equally long matches "recent" takes the last one; "frequent" counts what followed the last 16 of them,
        token by token, and takes what came most often, the more recent if equally often.

    Raises:
      ValueError: n_min above n_max, or another `pick`.

    Source: prompt lookup decoding (Saxena, https://github.com/apoorvumang/prompt-lookup-decoding); Yang et al.,
    arXiv:2304.04487 (LLMA). Unlike those: longest match first, and drafts go on past the end of the text.

    >>> import jax, specjax
    >>> from specjax import testing
    >>> model, table = testing.table_model(1, 8), testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> out = specjax.generate(model, 9 * table, prompt_lookup(), (), jnp.array([[1, 2, 3, 1, 2]]), max_new_tokens=40)
    >>> int(out.stats.rounds[0]) < 39  # the text repeats itself
    True
    """
    n_max = integers.static(n_max, "n_max", most=_MOST)
    n_min = integers.static(n_min, "n_min", most=_MOST)
    if n_min > n_max:
        raise ValueError(
            f"n_min is {n_min} and n_max is {n_max}: matches of n_max tokens are tried first, then shorter ones down "
            "to n_min, so n_min must not be above n_max."
        )
    if pick not in ("recent", "frequent"):
        raise ValueError(f'pick must be "recent" or "frequent", got {pick!r}.')
    return _prompt_lookup(n_min, n_max, pick)


@functools.cache
def _prompt_lookup(n_min: int, n_max: int, pick: str) -> Drafter:
    def init(params: PyTree, batch: int, **_) -> PyTree:
        del batch
        if jax.tree.leaves(params):
            raise ValueError("prompt_lookup has no parameters: pass () as its drafter_params.")
        return ()

    def propose(params: PyTree, state: PyTree, context: Context, plan: DraftPlan) -> tuple[Draft, PyTree]:
        del params
        rows = context.rows
        matches = find_matches(
            rows.tokens, rows.lengths, plan.lengths > 0, n_min=n_min, n_max=n_max,
            count=1 if pick == "recent" else _CANDIDATES,
        )  # fmt: skip
        following = continuations(rows.tokens, rows.lengths, matches.places, plan.longest)
        if pick == "recent":
            tokens = following[:, 0]
        else:
            tokens = most_frequent(following, matches.sizes == matches.sizes[:, :1])
        return Draft(tokens, jnp.where(matches.sizes[:, 0] > 0, plan.lengths, 0), None), state

    return Drafter(propose, init, may_find_nothing=True, names=("prompt_lookup",))
