"""Speculation against plain decoding on a real pair: the same tokens, or near-ties that rounding explains."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from specjax import controllers, noise
from specjax.decode.api import autoregressive, generate
from specjax.noise import Role
from specjax.types import Array, Drafter, Generation, Model, PyTree, Sampling, Verifier
from specjax.verify import coupled, rejection


class Agreement(NamedTuple):
    """How far speculation and plain decoding agreed. Differences are of log-probabilities, in nats."""

    rule: str
    num_tokens: int  # compared, up to each row's first divergence
    gaps: list[float]  # per divergence, how far apart the two tokens are in a third pass; at a tie, 0
    rounding: float  # largest difference of one token's log-probability between passes of other widths
    allowed: float  # a larger gap than this is no near-tie

    def describe(self) -> str:
        """One line."""
        counted = f"{self.rule}: {self.num_tokens} tokens, "
        if not self.gaps:
            return counted + f"the same by both (rounding at most {self.rounding:.2g} nats)"
        which = "1 divergence, a near-tie" if len(self.gaps) == 1 else f"{len(self.gaps)} divergences, each a near-tie"
        return counted + (
            f"{which}: gap at most {max(self.gaps):.2g} nats, where passes of other widths round by {self.rounding:.2g}"
        )


def check_pair(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike | None = None,
    *,
    max_new_tokens: int = 64,
    draft_len: int = 5,
    temperature: float = 0.8,
) -> list[Agreement]:
    """Compares speculation with plain decoding, token for token: greedy, and sampled by the coupled verifier.

    A pass over K+1 tokens and a pass over one token round differently. In bfloat16 the difference can reverse a
    near-tie, and after that the two texts have nothing in common. So each row counts up to its first divergence. There
    a third pass, over the whole text at once, scores both tokens: the scores may differ by four times the largest
    rounding seen on the tokens before. In float32 such near-ties are rare.

    Args:
      model, params: the target.
      drafter, drafter_params: as for `generate`.
      prompts: [B, P] int32.
      prompt_lengths: [B] int32; None means P for all.
      max_new_tokens: tokens a row.
      draft_len: K.
      temperature: of the sampled comparison.

    Returns:
      An Agreement for each of the two comparisons.

    Raises:
      AssertionError: a divergence that is no near-tie, or passes that differ by more than rounding.

    >>> from specjax import drafters, testing
    >>> model = testing.table_model(1, 5)
    >>> table = testing.random_table(jax.random.key(0), order=1, vocab_size=5)
    >>> prompts = jnp.array([[1, 2], [3, 4]])
    >>> [found.gaps for found in testing.check_pair(model, table, drafters.draft_model(model), -table, prompts)]
    [[], []]
    """
    parts = (model, params, drafter, drafter_params, prompts, prompt_lengths, max_new_tokens, draft_len)
    return [
        _compare("greedy", *parts, rejection(), 0.0),
        _compare(f"temperature {temperature:g}, coupled", *parts, coupled(), temperature),
    ]


def _compare(
    rule: str, model: Model, params: PyTree, drafter: Drafter, drafter_params: PyTree, prompts, prompt_lengths,
    max_new_tokens: int, draft_len: int, verifier: Verifier, temperature: float,
) -> Agreement:  # fmt: skip
    key, sampling = jax.random.key(0), Sampling(temperature)
    options = {"key": key, "max_new_tokens": max_new_tokens, "sampling": sampling}
    plain = autoregressive(model, params, prompts, prompt_lengths, **options)
    out = generate(
        model, params, drafter, drafter_params, prompts, prompt_lengths, verifier=verifier,
        controller=controllers.fixed(draft_len), **options,
    )  # fmt: skip
    logits = _rescore(model, params, plain)  # [B, C, V], the logits before each place
    rounding, num_tokens, places = 0.0, 0, []
    ours, theirs = np.asarray(out.tokens), np.asarray(plain.tokens)
    starts, ends = np.asarray(plain.prompt_lengths), np.minimum(np.asarray(plain.lengths), np.asarray(out.lengths))
    for row in range(len(ours)):
        new = np.arange(starts[row], ends[row])
        differs = np.flatnonzero(ours[row, new] != theirs[row, new])
        same = new[: differs[0]] if len(differs) else new
        num_tokens += len(same)
        if len(differs):
            places.append((row, int(new[differs[0]])))
        if len(same):
            scored = np.asarray(jax.nn.log_softmax(logits[row, same], -1))[np.arange(len(same)), theirs[row, same]]
            for generation in (out, plain):
                found = np.abs(np.asarray(generation.log_probs.raw)[row, same] - scored)
                rounding = max(rounding, float(found.max()))
    _refuse_noise(rule, rounding, params)
    allowed = 4 * rounding / (temperature or 1.0)
    gaps = []
    for row, place in places:
        scores = logits[row, place] / (temperature or 1.0)
        if temperature:
            keys = noise.derive(noise.row_keys(key, jnp.array([row])), Role.TARGET, jnp.array([place]))
            scores = scores + noise.gumbels(keys, len(scores))[0]
        gaps.append(abs(float(scores[ours[row, place]] - scores[theirs[row, place]])))
        if gaps[-1] > allowed:
            raise AssertionError(
                f"{rule}: row {row} has token {ours[row, place]} at place {place}, plain decoding has "
                f"{theirs[row, place]}, and that is no near-tie: their scores differ by {gaps[-1]:.3g}, "
                f"rounding explains {allowed:.3g}."
            )
    return Agreement(rule, num_tokens, gaps, rounding, allowed)


def _rescore(model: Model, params: PyTree, generation: Generation) -> Array:
    """The logits that predict each place of the finished texts, from one pass: [B, C, V], place 0 unused."""
    batch, width = generation.tokens.shape
    cache, block = model.init_cache(params, batch, width), model.init_block(params, batch, width)
    logits = jax.jit(model.apply)(params, generation.tokens, cache, block).logits[..., : model.vocab_size]
    return jnp.roll(logits, 1, 1)


def _refuse_noise(rule: str, rounding: float, params: PyTree) -> None:
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    coarsest = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=1e-7)
    limit = max(1e-3, 64 * coarsest)
    if rounding > limit:
        raise AssertionError(
            f"{rule}: the same token's log-probability differs by {rounding:.3g} between passes, more than rounding "
            f"({limit:.3g}) explains: verification does not compute what decoding computes."
        )
