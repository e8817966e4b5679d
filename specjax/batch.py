"""The data of every row of a batch: sampling settings, text, token counts. `types.py` has the shape legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

from specjax.results import LogProbs

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class Sampling(NamedTuple):
    """How logits become a distribution, for each row.

    Every field is a scalar or [B] unless stated otherwise, and may be traced. Draft tokens are verified against the
    same processed distribution that they were drawn from; this keeps speculation exact. The steps run in the order of
    this list. A field that is None costs nothing.

    Attributes:
      repetition_penalty: above 0; 1 has no effect. Divides (negative ones: multiplies) the logits of tokens in the
        prompt or in the generated text.
      frequency_penalty: subtracted from a token's logit for each time that the token was generated.
      presence_penalty: subtracted once from the logit of every token generated before.
      logit_bias: [V] or [B, V] float32, added; -inf forbids.
      bad_words: [n] or [B, n] ids that are never emitted, pad -1.
      min_new_tokens: this many tokens are generated before a stop token is allowed.
      temperature: 0 is greedy, a one-hot distribution. At 0 the steps before this one apply too, those after it do not.
      top_k: 0 keeps all.
      top_p: in (0, 1]; 1 keeps all.
      min_p: in [0, 1), a share of the most likely token's probability: less likely tokens are dropped; 0 keeps all.
    """

    temperature: Array | float = 0.0
    top_k: Array | int = 0
    top_p: Array | float = 1.0
    min_p: Array | float = 0.0
    repetition_penalty: Array | float | None = None
    presence_penalty: Array | float | None = None
    frequency_penalty: Array | float | None = None
    logit_bias: Array | None = None
    bad_words: Array | Sequence[int] | None = None
    min_new_tokens: Array | int | None = None


class RowSampling(NamedTuple):
    """`Sampling` spread over the rows of a batch."""

    temperature: Array  # [B] float32
    top_k: Array  # [B] int32
    top_p: Array  # [B] float32
    min_p: Array  # [B] float32
    repetition_penalty: Array | None  # [B] float32
    presence_penalty: Array | None  # [B] float32
    frequency_penalty: Array | None  # [B] float32
    logit_bias: Array | None  # [B or 1, V] float32
    bad_words: Array | None  # [B, n] int32, pad -1
    min_new_tokens: Array | None  # [B] int32


class Processor(Protocol):
    """A caller's own rule, such as a grammar or a mask: a pure function of one place in a row, mapped over all places.

    Hashed by identity: define it once, not in every call, or each call compiles anew.
    """

    def __call__(
        self,
        logits: Array,  # [V] float32, V = vocab_size
        tokens: Array,  # [C] int32: the prompt and all tokens before this place, draft tokens included; then -1
        length: Array,  # [] int32: number of these tokens
        /,
    ) -> Array: ...  # [V] float32; -inf forbids a token, NaN and +inf end the row


class Counts(NamedTuple):
    """Token counts of a row's text, for the penalties; None in `Rows` if no penalty is asked for."""

    in_prompt: Array  # [B, V] bool
    generated: Array  # [B, V] int32, how often each token was generated


class Rows(NamedTuple):
    """What every decoding loop keeps for each row of the batch."""

    tokens: Array  # [B, C + slack] int32; entries past `lengths` are never read
    lengths: Array  # [B] int32, prompt included; counts verified tokens only
    prompt_lengths: Array  # [B] int32
    limits: Array  # [B] int32, the length at which the row ends for max_new_tokens
    draft_limits: Array  # [B] int32, the most tokens to draft for the row in a round; 0: it does not speculate
    status: Array  # [B] int32, a `Status`
    keys: Array  # [B, roles] PRNG keys; see noise.py
    rounds: Array  # [B] int32, rounds this row took part in
    stop_tokens: Array  # [B, n] int32, pad -1
    sampling: RowSampling
    log_probs: LogProbs  # [B, C + slack], as `tokens`
    counts: Counts | None


class Process(Protocol):
    """Turns logits of T places into processed logits, whose softmax is the distribution; for draft and target alike."""

    def __call__(
        self,
        logits: Array,  # [B, T, V] float32
        drafted: Array,  # [B, N] int32: this round's draft tokens
        visible: Array,  # [B or 1, T, N] bool: which of them come before each place
        depths: Array | None = None,  # [B or 1, N] int32: number of draft tokens before each one; None is a chain
    ) -> Array: ...  # [B, T, V] float32, -inf where the distribution is zero
