"""The words that every part of specjax speaks: four roles, and what passes between them.

Shape legend, used by every module:
    B  batch rows                K  longest draft of a round     V  columns of the logits
    T  tokens of one forward     N  slots of a block             S  slots of a cache
    P  padded prompt width       C  capacity (tokens per row)    D  model width

A role is a NamedTuple of pure functions, as in optax. A new drafter, verifier, controller or model
family is one new file that returns one of these tuples; the loop in `decode/` knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

from specjax.results import Generation as Generation
from specjax.results import LogProbs as LogProbs
from specjax.results import Stats as Stats
from specjax.sharding import Layout
from specjax.status import Status as Status

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any


class Sampling(NamedTuple):
    """How logits become a law, per row: every field is a scalar or [B] unless it says otherwise, and may be traced.

    One and the same law is used to draw draft tokens and to verify them; that is what keeps speculation exact. Logits
    are changed in the order of the list; a field that is None costs nothing.

    Attributes:
      repetition_penalty: above 0, 1 is none; divides (or multiplies) the logits of tokens in the prompt or generated.
      frequency_penalty: subtracted once for each time that a token was generated.
      presence_penalty: subtracted once from every token generated before.
      logit_bias: [V] or [B, V] float32, added; -inf forbids.
      bad_words: [n] or [B, n] ids that are never emitted, pad -1.
      min_new_tokens: no stop token among this many first tokens.
      temperature: 0 is greedy, a one-hot law; what comes before it counts at 0 too, what comes after does not.
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
    """Logits of T places to processed logits, whose softmax is the law; the one path for draft and target."""

    def __call__(
        self,
        logits: Array,  # [B, T, V] float32
        drafted: Array,  # [B, N] int32: this round's draft tokens
        visible: Array,  # [B or 1, T, N] bool: which of them stand before each place
        depths: Array | None = None,  # [B or 1, N] int32: how many draft tokens stand before each; None is a chain
    ) -> Array: ...  # [B, T, V] float32, -inf where the law is zero


class Context(NamedTuple):
    """What a drafter or a verifier may look at in a round. Read-only; a pytree, functions included."""

    rows: Rows  # text, lengths, keys and settings of each row
    target_cache: PyTree  # the target's own cache, for drafters that share it (early exit)
    process: Process  # from logits to a law
    draft_keys: Callable[[Array | int], Array]  # (step) -> keys [B]: the noise to draw the draft token at this step
    vocab_size: Array | int  # the target's: ids below it may be drafted


class Output(NamedTuple):
    """One forward pass over a block of tokens."""

    logits: Array  # [B, T, V] float32, or [B, M, V] where logits_at chose M places
    hidden: tuple[Array, ...]  # one [B, T, D] per layer asked for, in the order asked
    block: PyTree  # the block with these tokens appended


class Apply(Protocol):
    """Reads the cache and the open block, appends T tokens to the block; writes no cache.

    A token sees the cached tokens of its row, and those block slots that `visible` names: without it all slots before
    its own, and its own. It stands at position `length of the row in the cache + depth`; without `depths` the depth is
    the block slot. The T tokens take the block's slots from `filled` on, so one block may be filled by several calls.

    Returns:
      An Output: logits float32 [B, T, V], or [B, M, V] at `logits_at`; one [B, T, D] for each of `hidden_layers`; the
      block with these tokens appended, of the same shapes and dtypes as before.
    """

    def __call__(
        self,
        params: PyTree,
        tokens: Array,  # [B, T] int32
        cache: PyTree,
        block: PyTree,
        *,
        depths: Array | None = None,  # [T] or [B, T] int32: distance from the first block slot; None is a chain
        visible: Array | None = None,  # [T, N] or [B, T, N] bool: block slots seen by each token; None is a chain
        logits_at: Array | None = None,  # [B, M] int32: compute logits at these of the T places only
        hidden_layers: tuple[int, ...] = (),  # 0 is the embedding, i the output of the i-th layer
    ) -> Output: ...


class Commit(Protocol):
    """Moves the first `keep` tokens of the block (along `path`, for a tree) into the cache; forgets the rest.

    Args:
      cache: as `init_cache` or an earlier commit made it; the returned one has the same shapes and dtypes.
      block: as the last `apply` returned it.
      keep: [B] int32 in 0..filled, row by row; 0 leaves the row as if the block had never been.
      path: [B, n] int32, block slots in the order to keep them, of which the first `keep` count; None: slots 0, 1, ...
    """

    def __call__(self, cache: PyTree, block: PyTree, keep: Array, path: Array | None = None) -> PyTree: ...


class Model(NamedTuple):
    """A language model as pure functions; parameters are always arguments.

        apply(params, tokens, cache, block, *, depths=None, visible=None, logits_at=None, hidden_layers=()) -> Output
        init_cache(params, batch, slots) -> cache
        init_block(params, batch, size) -> block
        commit(cache, block, keep, path=None) -> cache

    with tokens [B, T] int32, keep [B] int32, and cache and block any pytrees of arrays. `types.Apply`, `types.Commit`
    and `types.Output` say the shapes of the rest; docs/write-a-model.md goes through two models line by line.

    `apply` never touches the cache: the block's own state travels beside it, and `commit` writes what was kept.
    So a rejected token can leave no trace, whatever the architecture: attention keys, a ring, a recurrent state.

    A cache gets `slots` slots, K + 1 more than a row's text may fill, since `commit` may write a whole block behind
    the live part. A block gets `size` slots, as many as will be appended to it at most. All four are traced: shapes
    follow from arguments' shapes and the two ints alone. `testing.check_model(model, params)` tries them.
    A compiled program is found again by these functions: make them once, not in every call.
    """

    apply: Apply  # one forward pass over a block
    init_cache: Callable[[PyTree, int, int], PyTree]  # (params, batch, slots) -> empty cache
    init_block: Callable[[PyTree, int, int], PyTree]  # (params, batch, size) -> empty block
    commit: Commit  # what of a block stays
    vocab_size: int  # ids below this may be emitted; logits may have more (padding) columns
    max_positions: int | None = None  # a hard limit on the capacity, where the architecture has one
    trees: bool = True  # whether apply honours `depths` and `visible`
    hidden: bool = True  # whether apply gives hidden states
    layout: Layout | None = None  # where it lies on a mesh; the loop keeps its rows there too
    stop_tokens: tuple[int, ...] = ()  # where its texts end: the default of `specjax.text`; `generate` wants to be told


class Draft(NamedTuple):
    """What a drafter proposes in one round."""

    tokens: Array  # [B, K] int32; entries past `lengths` are arbitrary valid ids
    lengths: Array  # [B] int32 in 0..K
    probs: Array | None  # [B, K, V] float32, the law each token was drawn from; None: a one-hot law at the token
    parents: Array | None = None  # [K] or [B, K] int32: index of the parent token, -1 the root; None: a chain


class Drawn(NamedTuple):
    """One draft token of each row, just drawn."""

    token: Array  # [B] int32
    law: Array  # [B, V] float32, what it was drawn from
    confidence: Array  # [B] float32: the drafter's own probability of it, at temperature 1 whatever `Sampling` says


class KeepDrafting(Protocol):
    """Whether to draft on after the token `drawn` at `step`; [B] bool. The token itself stays in the draft: were it
    left out for what it is, those that stay would no longer follow the law that they were drawn from."""

    def __call__(self, drawn: Drawn, step: Array | int) -> Array: ...


class DraftPlan(NamedTuple):
    """How much to draft this round."""

    lengths: Array  # [B] int32 in 0..longest; 0 for rows that have ended
    longest: int  # K, static
    steps: int | Array  # the longest row's length, 1 or more; a Python int where the controller never varies it
    may_skip: bool = True  # static: whether there may have been rounds without a draft, of which `propose` saw nothing
    keep_drafting: KeepDrafting | None = None  # asked after each drafted token; None: never stop early


class Target(NamedTuple):
    """The target's view of the root and every drafted token."""

    logits: Array  # [B, K+1, V] float32, after processing (temperature, top-k, ...), padding columns at -inf
    probs: Array  # [B, K+1, V] float32, their law


class Verdict(NamedTuple):
    """What a verifier decides for one round."""

    num_accepted: Array  # [B] int32 in 0..K; never counts next_token
    next_token: Array  # [B] int32: the corrected token, or the bonus token after a full acceptance
    path: Array | None = None  # [B, depth] int32: draft indices of the accepted path, for a tree


class Round(NamedTuple):
    """What happened in one round: for controllers, drafters, streams and traces."""

    tokens: Array  # [B, K+1] int32, emitted tokens, pad -1
    num_emitted: Array  # [B] int32 in 0..K+1; 0 for a row that had ended
    num_accepted: Array  # [B] int32, emitted tokens that were drafted
    draft_tokens: Array  # [B, K] int32, pad -1
    draft_lengths: Array  # [B] int32
    draft_probs: Array  # [B, K] float32, of each draft token under the law it was drawn from; arbitrary past the draft
    target_log_probs: LogProbs  # [B, K] each, the target's of the draft tokens; arbitrary past the draft
    log_probs: LogProbs  # [B, K+1] each, of the emitted tokens; arbitrary past num_emitted
    hidden: tuple[Array, ...]  # the target's hidden states of the block [B, K+1, D], per layer the drafter asked for
    path: Array | None = None  # [B, depth] int32, for a tree


class Drafter(NamedTuple):
    """Proposes tokens. `state` is the drafter's own pytree, carried through the loop."""

    init: Callable[..., PyTree]  # (params, context, prompts [B, P], hidden, *, slots, longest) -> state
    # (params, state, context, plan) -> (draft, state). Not asked in a round for which the controller wants no draft.
    propose: Callable[..., tuple[Draft, PyTree]]
    # (params, state, context, round) -> state, as it was before `propose` in form. Called after each draft is settled,
    # with the context after the round, and after each plain step; where nobody found a draft, after both.
    commit: Callable[..., PyTree]
    vocab_size: int | None = None  # None where any vocabulary will do
    hidden_layers: tuple[int, ...] = ()  # the target's layers whose hidden states it asks for


class Verifier(NamedTuple):
    """Decides which draft tokens stay."""

    verify: Callable[[Context, Draft, Target], Verdict]  # (context, draft, target) -> verdict
    greedy_only: bool = False  # refuses temperatures above 0
    # Drafters draw with the noise that the target will use at the same position. Only for verifiers that compare
    # tokens with the target's own draw: in any other the noise would be used twice.
    coupled: bool = False


class Controller(NamedTuple):
    """Chooses how many tokens to draft, round by round. It may look at anything but the noise of a round to come."""

    init: Callable[[int], PyTree]  # (batch) -> state
    draft_len: Callable[[PyTree, Rows], Array]  # (state, rows) -> [B] int32 in 0..longest
    update: Callable[[PyTree, Round], PyTree]  # (state, round) -> state
    # Draft lengths that verification is compiled for, ascending: a round takes the first that holds its longest draft.
    # The last is K, the most that is ever drafted; one that begins with 0 has plain decoding steps for rounds without
    # a draft. A single one has a loop of known length and no branches.
    buckets: tuple[int, ...]
    # (state, drawn, step) -> [B] bool: whether to draft on after this token. None: never stop early.
    keep_drafting: Callable[[PyTree, Drawn, Array | int], Array] | None = None
    begin: Callable[[PyTree], PyTree] | None = None  # (state of an earlier call) -> state for new texts. None: as it is

    @property
    def longest(self) -> int:
        """K."""
        return self.buckets[-1]


class Roles(NamedTuple):
    """The static half of a generation: hashable, so that jit knows an old program by it."""

    model: Model
    drafter: Drafter
    verifier: Verifier
    controller: Controller
    processor: Processor | None = None
