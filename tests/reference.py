"""Plain NumPy versions of what specjax computes, short and obviously right."""

from __future__ import annotations

import numpy as np


def attention(query, keys, values, seen, scale):
    """One row, one head. query [T, D], keys and values [n, D], seen [T, n] bool -> [T, D], float64."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    scores = np.where(seen, query @ keys.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


def rejection(tokens, length, draft_probs, target_probs, uniforms, gumbels):
    """One row of token-level rejection sampling with given noise -> (num_accepted, next_token).

    tokens [K], draft_probs [K, V] (None: one-hot), target_probs [K+1, V], uniforms [K], gumbels [V].
    """
    for place in range(length):
        token = tokens[place]
        draft = np.eye(target_probs.shape[1])[token] if draft_probs is None else draft_probs[place]
        if not uniforms[place] * draft[token] < target_probs[place, token]:
            residual = np.maximum(target_probs[place] - draft, 0)
            if residual.sum() == 0:
                residual = target_probs[place]
            return place, int(
                np.argmax(np.log(residual, where=residual > 0, out=np.full(residual.shape, -np.inf)) + gumbels)
            )
    law = target_probs[length]
    return length, int(np.argmax(np.log(law, where=law > 0, out=np.full(law.shape, -np.inf)) + gumbels))
