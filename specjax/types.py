"""The words that every part of specjax speaks: four roles, and what passes between them.

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


class Extended(NamedTuple):
    """A cache with a long text added, and what the model said of it."""

    cache: PyTree
    logits: Array  # [B, M, V] float32, at the M places asked for
    hidden: tuple[Array, ...]  # one [B, T, D] per layer asked for


class Extend(Protocol):
    """Reads T tokens into the cache without a block: prompts, and text that a draft model has missed.

    For models whose block would hold more than the text needs, such as a recurrent state for every token. The first
    `keep` [B] of the tokens, 0..T, are kept in each row; `logits_at` and `hidden_layers` as for `Apply`.
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
    and `types.Output` say the shapes of the rest; docs/write-a-model.md goes through two models line by line.

    `apply` never touches the cache: the block's own state travels beside it, and `commit` writes what was kept.
    So a rejected token can leave no trace, whatever the architecture: attention keys, a ring, a recurrent state.

    A cache gets `slots` slots, K + 1 more than a row's text may fill, since `commit` may write a whole block behind
    the live part. A block gets `size` slots, as many as will be appended to it at most. All four are traced: shapes
    follow from arguments' shapes and the two ints alone. `testing.check_model(model, params)` tries them.
    A compiled program is found again by these functions: make them once, not in every call.
    """

    apply: Apply  # one forward pass over a block
    init_cache: Callable[..., PyTree]  # (params, batch, slots) -> empty cache; (..., inputs) where it takes them
    init_block: Callable[[PyTree, int, int], PyTree]  # (params, batch, size) -> empty block
    commit: Commit  # what of a block stays
    vocab_size: int  # ids below this may be emitted; logits may have more (padding) columns
    max_positions: int | None = None  # a hard limit on the capacity, where the architecture has one
    trees: bool = True  # whether apply honours `depths` and `visible`
    hidden: bool = True  # whether apply gives hidden states
    layout: Layout | None = None  # where it lies on a mesh; the loop keeps its rows there too
    stop_tokens: tuple[int, ...] = ()  # where its texts end: the default of `specjax.text`; `generate` wants to be told
    extend: Extend | None = None  # None: apply, then commit
    takes_inputs: bool = False  # whether init_cache has a fourth argument, the `inputs` that an encoder reads


class Draft(NamedTuple):
    """What a drafter proposes in one round: a chain of tokens, or a tree of them."""

    tokens: Array  # [B, N] int32; entries past `lengths` are arbitrary valid ids
    lengths: Array  # [B] int32 in 0..N: how many of them count
    probs: Array | None  # [B, N, V] float32, what each token was drawn from; None: a one-hot distribution at the token
    parents: Array | None = None  # [N] or [B, N] int32: index of the parent token, -1 the root; None: a chain
    # [N] or [B, N] int32: where in `probs`, then [B, M, V], each token's distribution stands. Siblings share one.
    probs_at: Array | None = None


class Drawn(NamedTuple):
    """One draft token of each row, just drawn."""

    token: Array  # [B] int32
    probs: Array  # [B, V] float32, what it was drawn from
    confidence: Array  # [B] float32: the drafter's own probability of it, at temperature 1 whatever `Sampling` says


class KeepDrafting(Protocol):
    """Whether to draft on after the token `drawn` at `step`; [B] bool. The token itself stays in the draft: were it
    left out for what it is, those that stay would no longer follow the distribution that they were drawn from."""

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
    draft_lengths: Array  # [B] int32 in 0..K: how many of them follow each other at most; of a tree its depth
    draft_probs: Array  # [B, N] float32, of each draft token where it was drawn; arbitrary past the draft
    target_log_probs: LogProbs  # [B, N] each, the target's of the draft tokens; arbitrary past the draft
    log_probs: LogProbs  # [B, K+1] each, of the emitted tokens; arbitrary past num_emitted
    at_leaf: Array  # [B] bool: no draft token follows the accepted ones, and what the target adds is a bonus token
    path: Array | None = None  # [B, K] int32, for a tree


def no_state(params: PyTree, batch: int, **sizes: Any) -> PyTree:
    """`Drafter.init` of a drafter that remembers nothing."""
    del params, batch, sizes
    return ()


def read_nothing(
    params: PyTree, state: PyTree, context: Context, tokens: Array, hidden: tuple[Array, ...], keep: Array
) -> PyTree:
    """`Drafter.read` of a drafter that looks at `context.rows` only, or at nothing."""
    del params, context, tokens, hidden, keep
    return state


class Drafter(NamedTuple):
    """Proposes tokens. `state` is the drafter's own pytree, carried through the loop; its form never changes.

        propose(params, state, context, plan) -> (Draft, state)
        init(params, batch, *, slots, longest, inputs, learnt) -> state
        read(params, state, context, tokens, hidden, keep) -> state

    `init` makes the state of rows that hold no text. `slots` is what a cache needs, `longest` is K, `inputs` what an
    encoder reads or None, `learnt` what an earlier call left or None; take `**_` for what you do not need.

    `read` is how a drafter sees text, all of it, in order: tokens [B, T] int32 that the target has just read, of which
    the first `keep` [B] are the row's, with the target's hidden states at them, one [B, T, D] for each layer asked for.
    A call is a chunk of the prompt (T is wide), or a round's accepted tokens (T = K + 1) or a plain round's (T = 1). So
    between rounds a drafter has read all of a row's text but its last token, which is the next round's root.

    `propose` is not called in rounds for which the controller wants no draft. After it comes `read`, always; its state
    may have another form in between. No row drafts deeper than `plan.lengths`.
    """

    propose: Callable[..., tuple[Draft, PyTree]]
    init: Callable[..., PyTree] = no_state
    read: Callable[..., PyTree] = read_nothing
    vocab_size: int | None = None  # None where any vocabulary will do
    hidden_layers: tuple[int, ...] = ()  # the target's layers whose hidden states it asks for
    num_nodes: Callable[[int], int] | None = None  # (K) -> N, of a drafter of trees; None: chains, N = K
    learnt: Callable[[PyTree], PyTree] | None = None  # (state) -> what outlives a call, `Generation.drafter_state`


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


class Setup(NamedTuple):
    """The static half of a generation: hashable, so that jit knows an old program by it."""

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
    def slots(self) -> int:
        """S: a round may write K + 1 slots past the live ones."""
        return self.capacity + self.longest + 1


class Params(NamedTuple):
    """The parameters of a generation, always arguments."""

    target: PyTree
    drafter: PyTree = None
