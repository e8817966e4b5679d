"""Plain NumPy versions of what specjax computes, short and obviously right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def attention(query, keys, values, seen, scale):
    """One row, one head. query [T, D], keys and values [n, D], seen [T, n] bool -> [T, D], float64."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    scores = np.where(seen, query @ keys.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


def greedy_rounds(target, draft, prompt, count, draft_len):
    """Rounds that greedy speculation takes to write `count` tokens after `prompt`, from two tables of one order."""

    def best(table, text):
        return int(np.argmax(table[tuple(text[-(table.ndim - 1) :])]))

    text, end, rounds = [*prompt, best(target, prompt)], len(prompt) + count, 0
    while len(text) < end:
        ahead = list(text)
        for _ in range(min(draft_len, end - len(text) - 1)):
            ahead.append(best(draft, ahead))
        for place in range(len(text), len(ahead) + 1):
            text.append(best(target, text))
            if place == len(ahead) or ahead[place] != text[-1]:
                break
        rounds += 1
    return rounds


class Case(NamedTuple):
    """One row for a verifier: what it sees, and its noise."""

    tokens: np.ndarray  # [K]
    length: int
    draft: np.ndarray  # [K, V], the distribution of each draft token
    target: np.ndarray  # [K+1, V]
    uniforms: np.ndarray  # [K]
    residual_noise: np.ndarray  # [V] Gumbel
    target_noise: np.ndarray  # [K+1, V] Gumbel, by position


class Decision(NamedTuple):
    num_accepted: int
    next_token: int
    margin: float  # of the closest comparison: below rounding, float32 may fall the other way


def rejection(case: Case) -> Decision:
    """Leviathan et al., algorithm 1."""
    margin = 1.0
    for place in range(case.length):
        token = case.tokens[place]
        draft, target = case.draft[place, token], case.target[place, token]
        if target > 0:  # a token without target mass is never kept, whatever the rounding
            margin = min(margin, abs(case.uniforms[place] * draft - target))
        if not case.uniforms[place] * draft < target:
            return _next(case, place, np.maximum(case.target[place] - case.draft[place], 0), margin)
    return _next(case, case.length, case.target[case.length], margin)


def block(case: Case) -> Decision:
    """Sun et al., algorithm 2."""
    joint, margin = [1.0], 1.0
    for place in range(case.length):
        token = case.tokens[place]
        joint.append(min(joint[-1] * case.target[place, token] / case.draft[place, token], 1.0))
    kept = 0
    for count in range(1, case.length + 1):
        passes = joint[count]
        if count < case.length:
            mass = np.maximum(joint[count] * case.target[count] - case.draft[count], 0).sum()
            rest = mass + 1 - joint[count]
            passes = mass / rest if rest > 0 else 0.0
            if rest < 1e-6 and joint[count] == 1.0:
                continue  # both distributions agree: the next token stays, whatever happens here
        if 0 < passes < 1:
            margin = min(margin, abs(case.uniforms[count - 1] - passes))
        if case.uniforms[count - 1] < passes:
            kept = count
    if kept == case.length:
        return _next(case, kept, case.target[kept], margin)
    return _next(case, kept, np.maximum(joint[kept] * case.target[kept] - case.draft[kept], 0), margin)


def coupled(case: Case) -> Decision:
    """Daliri et al., section 3: the target's own draws, and how long the draft agrees with them."""
    scores = [_log(probs) + noise for probs, noise in zip(case.target, case.target_noise, strict=True)]
    margin = min(float(np.diff(np.sort(score)[-2:])[0]) for score in scores)
    draws = [int(np.argmax(score)) for score in scores]
    return _while(case, lambda place: case.tokens[place] == draws[place], lambda place: draws[place], margin)


def greedy(case: Case) -> Decision:
    """Greedy decoding, and how long the draft agrees with it."""
    best = [int(np.argmax(probs)) for probs in case.target]
    return _while(case, lambda place: case.tokens[place] == best[place], lambda place: best[place], 1.0)


def typical_lossy(case: Case, epsilon: float = 0.3, delta: float = 0.09) -> Decision:
    """Medusa, section 2.3.1."""
    margins = [1.0]

    def judge(place: int) -> bool:
        probs, own = case.target[place], case.target[place, case.tokens[place]]
        entropy = -sum(p * np.log(p) for p in probs if p > 0)
        threshold = min(epsilon, delta * np.exp(-entropy))
        margins.append(abs(own - threshold))
        return own > threshold

    return _while(case, judge, lambda place: _draw(case, case.target[place]), margins)


def top_k_lossy(case: Case, k: int = 3) -> Decision:
    """Rejection sampling in which a draft token among the k most likely always stays."""
    margin = 1.0
    for place in range(case.length):
        token = case.tokens[place]
        draft, target = case.draft[place, token], case.target[place, token]
        if target > 0 and int((case.target[place] > target).sum()) < k:
            continue
        if target > 0:
            margin = min(margin, abs(case.uniforms[place] * draft - target))
        if not case.uniforms[place] * draft < target:
            return _next(case, place, np.maximum(case.target[place] - case.draft[place], 0), margin)
    return _next(case, case.length, case.target[case.length], margin)


def _while(case, judge, following, margin) -> Decision:
    kept = 0
    while kept < case.length and judge(kept):
        kept += 1
    return Decision(kept, following(kept), min(margin) if isinstance(margin, list) else margin)


def _next(case: Case, kept: int, residual: np.ndarray, margin: float) -> Decision:
    mass = residual.sum()
    if mass == 0:
        return Decision(kept, _draw(case, case.target[kept]), margin)
    return Decision(kept, _draw(case, residual), margin if mass > 1e-5 else 0.0)


def _draw(case: Case, probs: np.ndarray) -> int:
    return int(np.argmax(_log(probs) + case.residual_noise))


def _log(probs: np.ndarray) -> np.ndarray:
    return np.log(probs, where=probs > 0, out=np.full(probs.shape, -np.inf))
