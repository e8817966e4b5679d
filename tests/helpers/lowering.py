"""The compiled form of a generation, for tests that look into it."""

from __future__ import annotations

from typing import Any

from specjax import Sampling
from specjax.decode import api, plain
from specjax.decode.call import Call, prepare


def call(model, params, drafter, drafter_params, prompts, lengths, max_new_tokens, **options: Any) -> Call:
    """What `generate` makes of these arguments."""
    filled = {"key": None, "sampling": Sampling(), "stop_tokens": (), "seeds": None, "capacity": None, **options}
    return prepare(model, params, drafter, drafter_params, prompts, lengths, max_new_tokens=max_new_tokens, **filled)


def lowered(*given: Any, **options: Any) -> Any:
    """The program of `generate`, not yet compiled."""
    made = call(*given, **options)
    return api._generate.lower(made.setup, 1, made.params, made.request, made.learnt, 0)


def lowered_plainly(model, params, prompts, lengths, max_new_tokens, **options: Any) -> Any:
    """The program of `autoregressive`, not yet compiled."""
    parts = model, params, plain.DRAFTER, None, prompts, lengths, max_new_tokens
    return lowered(*parts, controller=plain.CONTROLLER, **options)
