"""How easy the text is for the drafter: a belief about each row, by Bayes' rule."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.types import Array

# A stretch of text is of one kind, and these are the kinds: the chance of a draft token to be accepted. Texts are easy
# or hard for a while, so a draft that was right so far is in an easy one, and its later tokens are the better for it.
KINDS = (0.02, 0.1, 0.25, 0.45, 0.65, 0.8, 0.9, 0.96, 0.99)
STRETCH = 64.0  # tokens in a stretch, on average; any of them may be its last
_SURE = 4.0  # what the prior is worth, in tested tokens


def expected(mean: float) -> np.ndarray:
    """[S] float32: chances of the kinds before anything was seen, those of a beta law of about this mean.

    >>> law = expected(0.7)
    >>> round(float(law @ np.asarray(KINDS)), 2)
    0.71
    """
    kinds, mean = np.asarray(KINDS), min(max(mean, KINDS[0]), KINDS[-1])
    edges = np.concatenate([[0.0], (kinds[1:] + kinds[:-1]) / 2, [1.0]])
    law = kinds ** (_SURE * mean - 1) * (1 - kinds) ** (_SURE * (1 - mean) - 1) * np.diff(edges)
    return (law / law.sum()).astype(np.float32)


def later(law: Array, usual: Array, tokens: Array) -> Array:
    """[B, S]: what is believed of a row when [B] `tokens` more have been emitted: other stretches are of `usual` kinds,
    [S]."""
    same = (1 - 1 / STRETCH) ** tokens.astype(jnp.float32)[:, None]
    return same * law + (1 - same) * usual[None]


def stretch(left: Array) -> Array:
    """How many tokens of those left are expected to be of the present stretch; float32, of the same shape."""
    return STRETCH * (1 - (1 - 1 / STRETCH) ** left)


def seen(law: Array, accepted: Array, tested: Array) -> Array:
    """[B, S]: what is believed of rows of which [B] `tested` draft tokens were tested, and so many accepted."""
    kinds = jnp.asarray(KINDS, jnp.float32)[None]
    right, wrong = (count.astype(jnp.float32)[:, None] for count in (accepted, tested - accepted))
    law = law * kinds**right * (1 - kinds) ** wrong
    return law / jnp.sum(law, 1, keepdims=True)


def tokens(law: Array, longest: int) -> Array:
    """[..., K+1] float32: how many a round is expected to emit with a draft of 0 to K, of which all are accepted up to
    the first that is not; and one more always is.

    >>> tokens(jnp.zeros((9,)).at[2].set(1.0), 2).tolist()
    [1.0, 1.25, 1.3125]
    """
    by_kind = np.cumsum(np.asarray(KINDS)[:, None] ** np.arange(longest + 1)[None], 1)  # [S, K+1]
    return jnp.matmul(law, jnp.asarray(by_kind, jnp.float32), precision=lax.Precision.HIGHEST)
