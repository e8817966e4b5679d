"""What is kept for every row of a batch: how to sample, the text, penalties' counts. `types.py` has the legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

from specjax.results import LogProbs

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class Sampling(NamedTuple):
    """How logits become a distribution, per row: every field is a scalar or [B] unless it says otherwise, and may be
    traced.

    One and the same distribution is used to draw draft tokens and to verify them; that is what keeps speculation exact.
    Logits are changed in the order of the list; a field that is None costs nothing.

    Attributes:
      repetition_penalty: above 0, 1 is none; divides (or multiplies) the logits of tokens in the prompt or generated.
      frequency_penalty: subtracted once for each time that a token was generated.
      presence_penalty: subtracted once from every token generated before.
      logit_bias: [V] or [B, V] float32, added; -inf forbids.
      bad_words: [n] or [B, n] ids that are never emitted, pad -1.
      min_new_tokens: no stop token among this many first tokens.
      temperature: 0 is greedy, a one-hot distribution; what comes before it counts at 0 too, what comes after does not.
      top_k: 0 keeps all.
      top_p: in (0, 1]; 1 keeps all.
      min_p: in [0, 1), of the most likely token's probability; 0 keeps all.
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
    """A caller's own rule, a grammar or a mask: a pure function of one place in one row, mapped over all of them.

    Hashed by identity: define it once, not in every call, or each call compiles anew.
    """

    def __call__(
        self,
        logits: Array,  # [V] float32, V = vocab_size
        tokens: Array,  # [C] int32: the prompt and all before this place, drafted tokens included; then -1
        length: Array,  # [] int32: how many of them
        /,
    ) -> Array: ...  # [V] float32; -inf forbids a token, NaN and +inf end the row


class Counts(NamedTuple):
    """What penalties need to know of a row's text; kept only where a penalty is asked for."""

    in_prompt: Array  # [B, V] bool
    generated: Array  # [B, V] int32, how often each token was generated


class Rows(NamedTuple):
    """What every decoding loop keeps for each row of the batch."""

    tokens: Array  # [B, C + slack] int32; past `lengths` it holds leftovers that nobody reads
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
    """Logits of T places to processed logits, whose softmax is the distribution; the one path for draft and target."""

    def __call__(
        self,
        logits: Array,  # [B, T, V] float32
        drafted: Array,  # [B, N] int32: this round's draft tokens
        visible: Array,  # [B or 1, T, N] bool: which of them stand before each place
        depths: Array | None = None,  # [B or 1, N] int32: how many draft tokens stand before each; None is a chain
    ) -> Array: ...  # [B, T, V] float32, -inf where the distribution is zero
