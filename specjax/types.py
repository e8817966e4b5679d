"""The types that every part of specjax shares: the four roles, and the values that they exchange.

Shape legend, used by every module:
    B  batch rows                K  longest draft of a round     V  columns of the logits
    T  tokens of one forward     N  nodes of a draft: K of a chain, any number of a tree of depth K
    P  padded prompt width       C  capacity (tokens per row)    S  slots of a cache    D  model width

A role is a NamedTuple of pure functions, as in optax. A new drafter, verifier, controller or model
family is one new file that returns one of these tuples; the loop in `decode/` knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from specjax.batch import Array as Array
from specjax.batch import Counts as Counts
from specjax.batch import Process as Process
from specjax.batch import Processor as Processor
from specjax.batch import PyTree as PyTree
from specjax.batch import Rows as Rows
from specjax.batch import RowSampling as RowSampling
from specjax.batch import Sampling as Sampling
from specjax.results import Generation as Generation
from specjax.results import LogProbs as LogProbs
from specjax.results import Stats as Stats
from specjax.sharding import Layout
from specjax.status import Status as Status


class Context(NamedTuple):
    """What a drafter or a verifier may look at in a round. Read-only; a pytree, functions included."""

    rows: Rows  # text, lengths, keys and settings of each row
    target_params: PyTree  # for drafters that use the target's embedding, head or layers
    target_cache: PyTree  # for drafters that share it (early exit)
    process: Process  # from logits to a distribution
    draft_keys: Callable[[Array | int], Array]  # (step) -> keys [B]: the noise to draw the draft token at this step
    vocab_size: Array | int  # the target's: ids below it may be drafted


class Output(NamedTuple):
    """One forward pass over a block of tokens."""

    logits: Array  # [B, T, V] float32, or [B, M, V] where logits_at chose M places
    hidden: tuple[Array, ...]  # one [B, T, D] per layer asked for, in the order asked
    block: PyTree  # the block with these tokens appended


class Apply(Protocol):
    """One forward pass: reads the cache and the open block, and appends T tokens to the block. Never writes the cache.

    A token attends to the cached tokens of its row and to the block slots that `visible` selects. Without `visible` it
    attends to its own slot and all slots before it. Its position is `length of the row in the cache + depth`; without
    `depths` the depth is the number of its block slot. The T tokens take the block's slots from `filled` on, so several
    calls may fill one block.

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
      keep: [B] int32 in 0..filled, for each row; 0 leaves the row as it was before the block.
      path: [B, n] int32, the block slots to keep, in order; the first `keep` of them are used. None: slots 0, 1, ...
    """

    def __call__(self, cache: PyTree, block: PyTree, keep: Array, path: Array | None = None) -> PyTree: ...


class Extended(NamedTuple):
    """A cache with a long text added, and the model's output for that text."""

    cache: PyTree
    logits: Array  # [B, M, V] float32, at the M places asked for
    hidden: tuple[Array, ...]  # one [B, T, D] per layer asked for


class Extend(Protocol):
    """Reads T tokens into the cache without a block: prompts, and text that a draft model has missed.

    For models whose block would need much memory for a long text, such as a recurrent state for every token. Each row
    keeps the first `keep` [B] of the tokens, 0..T; `logits_at` and `hidden_layers` as for `Apply`.
    """

    def __call__(
        self,
        params: PyTree,
        tokens: Array,  # [B, T] int32
        cache: PyTree,
        keep: Array,  # [B] int32
        *,
        logits_at: Array,  # [B, M] int32
        hidden_layers: tuple[int, ...] = (),
    ) -> Extended: ...


class Model(NamedTuple):
    """A language model as pure functions; parameters are always arguments.

        apply(params, tokens, cache, block, *, depths=None, visible=None, logits_at=None, hidden_layers=()) -> Output
        init_cache(params, batch, slots) -> cache
        init_block(params, batch, size) -> block
        commit(cache, block, keep, path=None) -> cache

    with tokens [B, T] int32, keep [B] int32, and cache and block any pytrees of arrays. `types.Apply`, `types.Commit`
    and `types.Output` document the other shapes; docs/write-a-model.md explains two models line by line.

    `apply` never changes the cache: the block holds the state of the new tokens, and `commit` writes the accepted ones.
    So a rejected token leaves no trace, in any architecture: attention keys, a ring buffer or a recurrent state.

    A cache has `slots` slots. That is K + 1 more than a row's text may fill, because `commit` may write a whole block
    after the live part. A block has `size` slots, the most tokens that will be appended to it. JAX traces all four
    functions: shapes may depend on the arguments' shapes and on the two ints only. `testing.check_model(model, params)`
    tests the functions. JAX finds a compiled program again by their identity: make them once, not in every call.
    """

    apply: Apply  # one forward pass over a block
    init_cache: Callable[..., PyTree]  # (params, batch, slots) -> empty cache; (..., inputs) where it takes them
    init_block: Callable[[PyTree, int, int], PyTree]  # (params, batch, size) -> empty block
    commit: Commit  # writes the accepted part of a block into the cache
    vocab_size: int  # ids below this may be emitted; logits may have more (padding) columns
    max_positions: int | None = None  # a hard limit on the capacity, where the architecture has one
    trees: bool = True  # whether apply honours `depths` and `visible`
    hidden: bool = True  # whether apply gives hidden states
    layout: Layout | None = None  # how it is placed on a mesh; the loop places its rows alike
    stop_tokens: tuple[int, ...] = ()  # ids that end a text: the default of `specjax.text`, but not of `generate`
    extend: Extend | None = None  # None: apply, then commit
    takes_inputs: bool = False  # whether init_cache has a fourth argument, the `inputs` that an encoder reads


class Draft(NamedTuple):
    """What a drafter proposes in one round: a chain of tokens, or a tree of them."""

    tokens: Array  # [B, N] int32; entries past `lengths` are arbitrary valid ids
    lengths: Array  # [B] int32 in 0..N: number of draft tokens
    probs: Array | None  # [B, N, V] float32, each token's draft distribution; None: one-hot at the token
    parents: Array | None = None  # [N] or [B, N] int32: index of the parent token, -1 the root; None: a chain
    # [N] or [B, N] int32: where in `probs`, then [B, M, V], each token's distribution stands. Siblings share one.
    probs_at: Array | None = None
    source: Array | None = None  # [B] int32, which of `Drafter.names` the row's draft is by; None: there is only one


class Drawn(NamedTuple):
    """One draft token of each row, just drawn."""

    token: Array  # [B] int32
    probs: Array  # [B, V] float32, the distribution it was drawn from
    confidence: Array  # [B] float32: the drafter's own probability of it, always at temperature 1


class KeepDrafting(Protocol):
    """Whether each row drafts another token after the token `drawn` at `step`; [B] bool.

    The token itself stays in the draft. Dropping a token because of its value would change the distribution of the
    tokens that stay.
    """

    def __call__(self, drawn: Drawn, step: Array | int) -> Array: ...


class DraftPlan(NamedTuple):
    """How much to draft this round."""

    lengths: Array  # [B] int32 in 0..longest; 0 for rows that have ended
    longest: int  # K, static
    steps: int | Array  # the longest row's length, 1 or more; a Python int where the controller never varies it
    may_skip: bool = True  # static: whether rounds without a draft may have passed, in which `propose` was not called
    keep_drafting: KeepDrafting | None = None  # asked after each drafted token; None: never stop early


class Target(NamedTuple):
    """The target's view of the root and every drafted token."""

    logits: Array  # [B, N+1, V] float32, after processing (temperature, top-k, ...), padding columns at -inf
    probs: Array  # [B, N+1, V] float32, their softmax


class Verdict(NamedTuple):
    """What a verifier decides for one round."""

    num_accepted: Array  # [B] int32 in 0..K; never counts next_token
    next_token: Array  # [B] int32: the corrected token, or the bonus token after a full acceptance
    path: Array | None = None  # [B, K] int32: draft indices of the accepted path, for a tree; 0 past num_accepted


class Round(NamedTuple):
    """What happened in one round: for controllers, streams, traces, and loops over `step`."""

    tokens: Array  # [B, K+1] int32, emitted tokens, pad -1
    num_emitted: Array  # [B] int32 in 0..K+1; 0 for a row that had ended
    num_accepted: Array  # [B] int32, emitted tokens that were drafted
    draft_tokens: Array  # [B, N] int32, pad -1
    draft_lengths: Array  # [B] int32 in 0..K: length of the draft; of a tree its depth
    draft_probs: Array  # [B, N] float32, the drafter's probability of each draft token; arbitrary past the draft
    target_log_probs: LogProbs  # [B, N] each, the target's scores of the draft tokens; arbitrary past the draft
    log_probs: LogProbs  # [B, K+1] each, of the emitted tokens; arbitrary past num_emitted
    at_leaf: Array  # [B] bool: no draft token follows the accepted ones, so the target's token is a bonus token
    source: Array | None = None  # [B] int32, which of `Drafter.names` drafted; -1 for no draft; None: there is only one
    path: Array | None = None  # [B, K] int32, for a tree


def no_state(params: PyTree, batch: int, **sizes: Any) -> PyTree:
    """`Drafter.init` of a drafter that remembers nothing."""
    del params, batch, sizes
    return ()


def read_nothing(
    params: PyTree, state: PyTree, context: Context, tokens: Array, hidden: tuple[Array, ...], keep: Array
) -> PyTree:
    """`Drafter.read` of a drafter that uses `context.rows` only, or no text at all."""
    del params, context, tokens, hidden, keep
    return state


class Drafter(NamedTuple):
    """Proposes tokens. `state` is the drafter's own pytree, carried through the loop; its structure stays the same.

        propose(params, state, context, plan) -> (Draft, state)
        init(params, batch, *, slots, longest, inputs, learnt) -> state
        read(params, state, context, tokens, hidden, keep) -> state

    `init` makes the state of rows without text. `slots` is the number of slots of a cache, `longest` is K, `inputs` is
    what an encoder reads or None, `learnt` is what an earlier call's `learnt` returned or None. Take `**_` for the
    arguments that you do not need.

    `read` gives the drafter all text in order: tokens [B, T] int32 that the target has just read, and the target's
    hidden states at them, one [B, T, D] for each layer asked for. The first `keep` [B] of the tokens belong to the row.
    A call brings a chunk of the prompt (T is wide), the accepted tokens of a round (T = K + 1) or the token of a plain
    round (T = 1). So between rounds a drafter has read all of a row's text except the last token, which is the root of
    the next round.

    `propose` is not called in rounds for which the controller wants no draft. A call of `read` always follows it; the
    state may have another structure between the two. No row drafts deeper than `plan.lengths`.
    """

    propose: Callable[..., tuple[Draft, PyTree]]
    init: Callable[..., PyTree] = no_state
    read: Callable[..., PyTree] = read_nothing
    vocab_size: int | None = None  # None where any vocabulary will do
    hidden_layers: tuple[int, ...] = ()  # the target's layers whose hidden states it asks for
    num_nodes: Callable[[int], int] | None = None  # (K) -> N, of a drafter of trees; None: chains, N = K
    # (state, rows) -> what to keep after a call, `Generation.drafter_state`
    learnt: Callable[[PyTree, Rows], PyTree] | None = None
    # Whether drafts are often empty: then a round in which no row has one is a plain step, with every controller.
    may_find_nothing: bool = False
    names: tuple[str, ...] = (
        "drafter",
    )  # who may have drafted, for statistics and traces; `Draft.source` says who did
    # (state, keep) -> state, for a drafter that can read accepted tokens later, at its next `propose`, from the rows'
    # text: called in place of `read` where another drafter's tokens were accepted. None: `read` must be called.
    defer: Callable[[PyTree, Array], PyTree] | None = None


class Verifier(NamedTuple):
    """Decides which draft tokens stay."""

    verify: Callable[[Context, Draft, Target], Verdict]  # (context, draft, target) -> verdict
    greedy_only: bool = False  # refuses temperatures above 0
    # True: drafters draw with the noise that the target uses at the same position. Only for verifiers that compare
    # draft tokens with the target's own sample; any other verifier would use the noise twice.
    coupled: bool = False


class Controller(NamedTuple):
    """Chooses how many tokens to draft, round by round. It may use anything except the noise of future rounds."""

    init: Callable[[int], PyTree]  # (batch) -> state
    draft_len: Callable[[PyTree, Rows], Array]  # (state, rows) -> [B] int32 in 0..longest
    update: Callable[[PyTree, Round], PyTree]  # (state, round) -> state
    # Draft lengths that verification is compiled for, ascending. A round uses the first one that holds its longest
    # draft. The last one is K, the longest possible draft. If the first one is 0, a round without a draft is a plain
    # decoding step. With one length only, the drafting loop has a known trip count and no branches.
    buckets: tuple[int, ...]
    # (state, drawn, step) -> [B] bool: whether to draft another token after this one. None: never stop early.
    keep_drafting: Callable[[PyTree, Drawn, Array | int], Array] | None = None
    begin: Callable[[PyTree], PyTree] | None = None  # (state of an earlier call) -> state for new texts. None: as it is

    @property
    def longest(self) -> int:
        """K."""
        return self.buckets[-1]


class Setup(NamedTuple):
    """The static part of a generation. It is hashable: jit finds a compiled program by it."""

    model: Model
    drafter: Drafter
    verifier: Verifier
    controller: Controller
    capacity: int  # C
    processor: Processor | None = None

    @property
    def longest(self) -> int:
        """K."""
        return self.controller.longest

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.longest if self.drafter.num_nodes is None else self.drafter.num_nodes(self.longest)

    @property
    def has_plain_rounds(self) -> bool:
        """Whether the loop has rounds without a draft."""
        return min(self.controller.buckets) == 0 or self.drafter.may_find_nothing

    @property
    def slots(self) -> int:
        """S: a round may write K + 1 slots past the live ones."""
        return self.capacity + self.longest + 1


class Params(NamedTuple):
    """The parameters of a generation, always arguments."""

    target: PyTree
    drafter: PyTree = None
