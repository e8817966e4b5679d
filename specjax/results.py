"""The result of a generation: texts, log-probabilities and counts."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
from jax.core import Tracer

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class LogProbs(NamedTuple):
    """The target's log-probability of each token, [B, C] float32; 0 outside the generated part.

    At temperature 0 the processed distribution is one-hot, so `processed` is 0. No gradient flows through a generation:
    for a policy gradient re-score `tokens` by one `model.apply` over them, which gives `raw` again, with a gradient.
    """

    raw: Array  # under the model's own distribution: temperature 1, nothing processed, padding columns left out
    processed: Array  # under the distribution that `Sampling` and the processor make of it


class Stats(NamedTuple):
    """Counts since the start, per row. The first token of a row comes from prefill and is not counted."""

    rounds: Array  # [B] int32; each is one target pass
    emitted: Array  # [B] int32, tokens emitted by rounds
    drafted: Array  # [B, K] int32, how often a token was drafted at this position
    tested: Array  # [B, K] int32, how often it was tested: every draft token before it had been accepted
    accepted: Array  # [B, K] int32, how often it was accepted and emitted
    by_longest: Array  # [B, K+1] int32, the row's rounds by the longest draft of any row, which sets a round's cost
    drafted_by: Array  # [B, S] int32, tokens drafted by each of `Drafter.names`; S is 1 but for combined drafters
    accepted_by: Array  # [B, S] int32, how many of those were accepted and emitted
    # [B] int32, changes between rounds in which some row had a draft and rounds in which none had; a first round with a
    # draft counts as a change. Every second one ends drafts.
    switches: Array


class Generation(NamedTuple):
    """The result of `generate` and `autoregressive`."""

    tokens: Array  # [B, C] int32: the prompt, then what was generated; pad_token past `lengths`
    lengths: Array  # [B] int32, prompt included
    prompt_lengths: Array  # [B] int32
    status: Array  # [B] int32, a `Status`
    log_probs: LogProbs  # of the generated tokens, at their places in `tokens`
    stats: Stats
    controller_state: PyTree = ()  # pass it to the next call, which continues from what was learnt
    drafter_state: PyTree = ()  # the same, of drafters that learn

    def new_tokens(self) -> list[list[int]]:
        """The generated ids of each row, stop token included, as Python lists.

        It waits for the device. Under jit read `tokens`, `prompt_lengths` and `lengths` instead.
        """
        if isinstance(self.tokens, Tracer):
            raise ValueError("new_tokens() is for the host: under jit read tokens, prompt_lengths and lengths.")
        tokens, lengths, starts = jax.device_get((self.tokens, self.lengths, self.prompt_lengths))
        return [row[start:end].tolist() for row, start, end in zip(tokens, starts, lengths, strict=True)]
