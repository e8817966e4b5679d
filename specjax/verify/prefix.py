"""Helpers of verifiers: the longest accepted prefix of a draft, and the probabilities of draft tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specjax.types import Array, Draft, Verdict


def drafted(draft: Draft) -> Array:
    """[B, N] bool: the places that hold a draft token."""
    return jnp.arange(draft.tokens.shape[1])[None] < draft.lengths[:, None]


def num_leading(accepted: Array) -> Array:
    """[B, K] bool -> [B] int32: how many hold before the first that does not."""
    return jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), -1), -1)


def matching(draft: Draft, wanted: Array) -> Verdict:
    """Accepts while draft tokens equal the `wanted` [B, K+1] ones; the next token is the wanted one there."""
    longest = draft.tokens.shape[1]
    num_accepted = num_leading((draft.tokens == wanted[:, :longest]) & drafted(draft))
    return Verdict(num_accepted, jnp.take_along_axis(wanted, num_accepted[:, None], 1)[:, 0])


def draft_probs(draft: Draft, width: int) -> Array:
    """[B, N, V]: the distribution of each draft token; zero where there is no draft token."""
    probs = jax.nn.one_hot(draft.tokens, width) if draft.probs is None else by_token(draft)
    return jnp.where(drafted(draft)[..., None], probs, 0.0)


def by_token(draft: Draft) -> Array:
    """[B, N, V]: the distribution of each token; in `draft.probs` siblings may share one."""
    assert draft.probs is not None, "the draft has one-hot distributions, which are not stored"
    if draft.probs_at is None:
        return draft.probs
    at = jnp.broadcast_to(jnp.atleast_2d(draft.probs_at), draft.tokens.shape)
    return jnp.take_along_axis(draft.probs, at[..., None], 1)


def at_tokens(probs: Array, tokens: Array) -> Array:
    """probs [B, K, V] of tokens [B, K] -> [B, K]."""
    return jnp.take_along_axis(probs, tokens[..., None], -1)[..., 0]


def at_place(values: Array, place: Array) -> Array:
    """values [B, n, ...] at one place [B] of each row -> [B, ...]."""
    index = place.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.take_along_axis(values, index, 1)[:, 0]
