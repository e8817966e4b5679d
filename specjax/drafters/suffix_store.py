"""Drafts what followed in other texts: a corpus, earlier outputs, what the last call wrote."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax import integers
from specjax.drafters.draw import draw
from specjax.drafters.matches import END, most_frequent
from specjax.drafters.sorted_texts import SortedTexts, append_texts, find_longest, sort_on_device
from specjax.drafters.store import Store
from specjax.types import Array, Context, Draft, Drafter, DraftPlan, Rows

_CANDIDATES = 32  # places that are asked what follows, of all that match; spread evenly over them
_MOST_RECENT = 2**20  # tokens
_MOST = 64


class StoreState(NamedTuple):
    """What a call looks things up in besides the store: texts of earlier calls."""

    recent: SortedTexts | None
    probs: (
        Array | None
    )  # [B, K, V] float32 of the last draft: reused, because a new buffer would cost time in every round


def suffix_store(
    *, n_min: int = 2, draw: Literal["counts", "mode"] = "counts", recent: int = 0, vocab_size: int | None = None
) -> Drafter:
    """Drafts from a `Store` of texts, which is the drafter_params of `generate`.

    The longest suffix of the row's text that occurs in the store is found in logarithmic time. Of all places where it
    occurs, up to 32 are asked for what follows. Rows without a match have no draft; a round in which no row has one is
    a plain step.

    Args:
      n_min: tokens that must match, 1 or more; the store's `depth` is the most that can.
      draw: "counts" draws each draft token from how often it followed, as the row's `Sampling` asks, and states that
        distribution; "mode" takes what followed most often, which is as good at temperature 0 and cheaper.
      recent: tokens of the newest texts, of this drafter's calls, that are kept beside the store; of more the oldest
        are dropped. What a call reads and writes is found by the next one that gets its `Generation.drafter_state`, not
        by itself: rows stay independent. 0 keeps none.
      vocab_size: of the target; "counts" needs it.

    Raises:
      ValueError: an argument is out of range.

    Source: REST (He et al., arXiv:2311.08252) drafts from a datastore's suffix array; SuffixDecoding (Oliaro et al.,
    arXiv:2411.04975) from counts in earlier outputs. Unlike those, all of it runs on the device, and tokens drawn by
    counts keep their distribution, so they are verified by rejection at any temperature.

    >>> import jax, specjax
    >>> from specjax import drafters, testing
    >>> model, table = testing.table_model(1, 8), testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> before = specjax.autoregressive(model, table, jnp.array([[1, 2]]), max_new_tokens=12)
    >>> store = drafters.Store.build(before.tokens)
    >>> out = specjax.generate(model, table, suffix_store(draw="mode"), store, jnp.array([[1, 2]]), max_new_tokens=12)
    >>> specjax.stats.acceptance_rate(out.stats)  # it was said before
    1.0
    """
    n_min = integers.static(n_min, "n_min", most=_MOST)
    recent = integers.static(recent, "recent", least=0, most=_MOST_RECENT)
    if draw not in ("counts", "mode"):
        raise ValueError(f'draw must be "counts" or "mode", got {draw!r}.')
    if draw == "counts":
        if vocab_size is None:
            raise ValueError(
                'draw="counts" states distributions over the vocabulary: pass vocab_size=model.vocab_size.'
            )
        vocab_size = integers.static(vocab_size, "vocab_size")
    return _suffix_store(n_min, draw, recent, vocab_size)


@functools.cache
def _suffix_store(n_min: int, how: str, recent: int, vocab_size: int | None) -> Drafter:
    def init(params: Store, batch: int, *, longest: int, learnt: Array | None, **_) -> StoreState:
        if not isinstance(params, Store):
            raise ValueError(
                f"drafter_params of suffix_store must be a drafters.Store, got a {type(params).__name__}: make one by "
                "drafters.Store.build(texts)."
            )
        tokens = jnp.full((recent,), END, jnp.int32) if learnt is None else learnt
        probs = jnp.zeros((batch, longest, vocab_size), jnp.float32) if how == "counts" else None
        return StoreState(sort_on_device(tokens, params.texts.depth) if recent else None, probs)

    def learnt(state: StoreState, rows: Rows) -> Array:
        assert state.recent is not None, "there is nothing to learn with recent=0"
        return append_texts(state.recent.tokens, rows.tokens, rows.lengths)

    def propose(params: Store, state: StoreState, context: Context, plan: DraftPlan) -> tuple[Draft, StoreState]:
        rows, texts = context.rows, params.texts
        back = rows.lengths[:, None] - 1 - jnp.arange(texts.depth)[None]
        suffix = jnp.where(back >= 0, jnp.take_along_axis(rows.tokens, jnp.maximum(back, 0), 1), -2)
        sizes, following, is_asked = _look_up(texts, suffix, n_min, plan.longest)
        if state.recent is not None:
            other = _look_up(state.recent, suffix, n_min, plan.longest)
            is_newer = other[0] >= sizes
            sizes, following, is_asked = (
                jnp.where(is_newer.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
                for new, old in zip(other, (sizes, following, is_asked), strict=True)
            )
        # A store made with another tokenizer may hold ids that the target does not have: they end a draft.
        following = jnp.where(following < context.vocab_size, following, END)
        if state.probs is None:
            tokens, probs = most_frequent(following, is_asked), None
        else:
            tokens, probs = _draw(context, state.probs, following, is_asked)
            state = state._replace(probs=probs)
        found = jnp.sum(jnp.cumprod((tokens != END).astype(jnp.int32), -1), -1)
        lengths = jnp.where(sizes > 0, jnp.minimum(found, plan.lengths), 0)
        return Draft(jnp.maximum(tokens, 0), lengths, probs), state

    return Drafter(
        propose,
        init,
        vocab_size=vocab_size,
        may_find_nothing=True,
        names=("suffix_store",),
        learnt=learnt if recent else None,
    )


def _look_up(texts: SortedTexts, suffix: Array, n_min: int, longest: int) -> tuple[Array, Array, Array]:
    """Matched tokens [B]; what follows at each of the places that are asked, [B, M, K], END from a text's end on; and
    which of those are places, [B, M] bool."""
    sizes, first, count = find_longest(texts, suffix, n_min=n_min)
    asked = jnp.minimum(count, _CANDIDATES)[:, None]
    turn = jnp.arange(_CANDIDATES)[None]
    # count * turn / asked, in parts that stay below 2**31
    each = jnp.maximum(asked, 1)
    at = first[:, None] + count[:, None] // each * turn + count[:, None] % each * turn // each
    place = texts.order[jnp.clip(at, 0, texts.size - 1)][..., None] + jnp.arange(longest)[None, None]
    tokens = jnp.where(place < texts.size, texts.tokens[jnp.minimum(place, texts.size - 1)], END)
    is_text = jnp.cumprod((tokens != END).astype(jnp.int32), -1) > 0
    return sizes, jnp.where(is_text, tokens, END), turn < asked


def _draw(context: Context, buffer: Array, following: Array, is_asked: Array) -> tuple[Array, Array]:
    """Draft tokens [B, K], END where nothing follows, each drawn from how often it follows those before it; and the
    distributions [B, K, V], in `buffer`."""
    batch, _, longest = following.shape
    width = buffer.shape[-1]

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tokens, probs, agree = carry
        now = lax.dynamic_index_in_dim(following, index, 2, keepdims=False)
        agree = agree & (now != END)

        @jax.vmap
        def count(now: Array, agree: Array) -> Array:
            return jnp.zeros((width,), jnp.float32).at[jnp.where(agree, now, width)].add(1.0, mode="drop")

        drawn = draw(context, jnp.log(count(now, agree)), jnp.maximum(tokens, 0), index)
        token = jnp.where(jnp.any(agree, -1), drawn.token, END)
        return (
            lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, 1),
            lax.dynamic_update_slice_in_dim(probs, drawn.probs[:, None], index, 1),
            agree & (now == token[:, None]),
        )

    tokens = jnp.full((batch, longest), END, jnp.int32)
    tokens, probs, _ = lax.fori_loop(0, longest, step, (tokens, buffer, is_asked))
    return tokens, probs
