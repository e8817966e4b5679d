"""The threshold of `controllers.confidence` that costs least, on a sample of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from specjax import controllers, integers, stats
from specjax.costs import Profile
from specjax.decode.api import generate
from specjax.types import Drafter, Model, PyTree

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Calibration(NamedTuple):
    """What each threshold costs; `controllers.confidence(found.threshold)` uses the best."""

    threshold: float  # the one that costs least
    thresholds: tuple[float, ...]
    speedups: tuple[float, ...]  # of each, over plain decoding, by the profile


def calibrate(
    model: Model,
    params: PyTree,
    drafter: Drafter,
    drafter_params: PyTree,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike | None = None,
    *,
    profile: Profile,
    thresholds: Sequence[float] = THRESHOLDS,
    max_new_tokens: int = 64,
    **options: Any,
) -> Calibration:
    """Generates from the prompts with each threshold, and takes what its rounds cost by the profile.

    The rounds are counted, not timed: a busy machine changes nothing but the profile. One program serves all
    thresholds, as they are the controller's state.

    Args:
      model, params, drafter, drafter_params, prompts, prompt_lengths: as for `generate`.
      profile: of the same models on this device, by `specjax.profile`; K is its own.
      thresholds: to try, each in 0..1.
      max_new_tokens: of each prompt.
      options: as for `generate`: sampling, verifier, key, stop_tokens ...

    Returns:
      A Calibration.

    Raises:
      ValueError: no threshold, or one outside 0..1; and as for `generate`.

    >>> import specjax
    >>> from specjax import testing
    >>> from specjax.costs import Costs, Profile
    >>> model, table = testing.table_model(1, 8), testing.random_table(jax.random.key(0), order=1, vocab_size=8)
    >>> costs = Costs(1, 8, 1.0, (1.0, 1.2, 1.4), (0.0, 0.2, 0.4), 0.0)
    >>> found = calibrate(model, table, specjax.drafters.draft_model(model), table, jnp.array([[1, 2]]),
    ...                   profile=Profile("chip", (0, 1, 2), (costs,)), thresholds=(0.0, 1.0))
    >>> found.threshold  # it drafts for itself: always right, so all of it pays
    0.0
    """
    if np.ndim(thresholds) != 1 or not len(thresholds):
        raise ValueError(f"thresholds must be one or more probabilities in 0..1, got {thresholds!r}.")
    thresholds = [integers.real(each, "each of thresholds", lambda x: 0 <= x <= 1, "in 0..1") for each in thresholds]
    controller = controllers.confidence(0.5, profile.longest)
    batch = np.shape(prompts)[0]
    speedups = []
    for threshold in thresholds:
        out = generate(
            model, params, drafter, drafter_params, prompts, prompt_lengths, controller=controller,
            controller_state=jnp.full((batch,), threshold, jnp.float32), max_new_tokens=max_new_tokens, **options,
        )  # fmt: skip
        context = float(np.mean(jax.device_get(out.prompt_lengths + out.lengths))) / 2
        speedups.append(stats.profiled_speedup(jax.device_get(out.stats), profile=profile, context=context))
    best = int(np.argmax(speedups))
    return Calibration(float(thresholds[best]), tuple(map(float, thresholds)), tuple(speedups))
