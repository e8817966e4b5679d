"""The target's half of a round, at one static width: its pass over the draft, the verdict, the commit.

A round is compiled at a few widths (`Controller.buckets`) and takes the narrowest that holds its drafts, so that a
shorter draft costs less. What each gives back is padded to the widest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax import noise, tree
from specjax.decode import log_probs, plain
from specjax.decode.context import context_of
from specjax.decode.plain import fault_of
from specjax.noise import Role
from specjax.rows import decide, is_active, last_tokens
from specjax.sampling import sample
from specjax.sharding import constrain
from specjax.types import Array, Draft, LogProbs, PyTree, Roles, Round, Rows, Status, Target
from specjax.verify.prefix import at_tokens, num_leading


class Settled(NamedTuple):
    """What the target made of a draft; the rows are as they were."""

    cache: PyTree  # the target's
    status: Array  # [B] int32, of each row after the round
    info: Round


def settle(roles: Roles, capacity: int, width: int, params: PyTree, rows: Rows, cache: PyTree, draft: Draft) -> Settled:
    """Verifies the first `width` places of the draft, which hold all of it."""
    first = draft._replace(
        tokens=draft.tokens[:, :width],
        probs=None if draft.probs is None else draft.probs[:, :width],
        parents=None if draft.parents is None else draft.parents[..., :width],
    )
    return _verify(roles, capacity, params, rows, cache, first)


def settle_plainly(roles: Roles, capacity: int, params: PyTree, rows: Rows, cache: PyTree) -> Settled:
    """A plain decoding step, told as a round without places for draft tokens."""
    model = roles.model
    batch = rows.lengths.shape[0]
    block = model.init_block(params, batch, 1)
    out = model.apply(params, last_tokens(rows, 1), cache, block, hidden_layers=roles.drafter.hidden_layers)
    new = plain.next_token(model, roles.processor, rows, out.logits[:, 0], capacity)
    num_emitted = new.decision.num_emitted
    nothing = jnp.zeros((batch, 0), jnp.float32)
    info = Round(
        tokens=jnp.where(num_emitted[:, None] > 0, new.tokens, -1),
        num_emitted=num_emitted,
        num_accepted=jnp.zeros_like(num_emitted),
        draft_tokens=jnp.zeros((batch, 0), jnp.int32),
        draft_lengths=jnp.zeros_like(num_emitted),
        draft_probs=nothing,
        target_log_probs=LogProbs(nothing, nothing),
        log_probs=new.log_probs,
        hidden=out.hidden,
    )
    return Settled(model.commit(cache, out.block, num_emitted, None), new.decision.status, info)


def widened(settled: Settled, like: Round) -> Settled:
    """With as many places as `like` has; those that are new hold nothing."""

    def pad(values: Array, wanted: Array, filler: float) -> Array:
        widths = ((0, 0), (0, wanted.shape[1] - values.shape[1]), *((0, 0),) * (values.ndim - 2))
        return jnp.pad(values, widths, constant_values=filler)

    def both(values: LogProbs, wanted: LogProbs) -> LogProbs:
        return LogProbs(pad(values.raw, wanted.raw, 0.0), pad(values.processed, wanted.processed, 0.0))

    info = settled.info
    wide = info._replace(
        tokens=pad(info.tokens, like.tokens, -1),
        draft_tokens=pad(info.draft_tokens, like.draft_tokens, -1),
        draft_probs=pad(info.draft_probs, like.draft_probs, 1.0),
        target_log_probs=both(info.target_log_probs, like.target_log_probs),
        log_probs=both(info.log_probs, like.log_probs),
        hidden=tuple(pad(x, wanted, 0) for x, wanted in zip(info.hidden, like.hidden, strict=True)),
        path=like.path if info.path is None else info.path,
    )
    return settled._replace(info=wide)


def _verify(roles: Roles, capacity: int, params: PyTree, rows: Rows, cache: PyTree, draft: Draft) -> Settled:
    model, drafter, verifier = roles.model, roles.drafter, roles.verifier
    width = draft.tokens.shape[1]
    context = context_of(roles, rows, cache)
    block_tokens = jnp.concatenate([last_tokens(rows, 1), draft.tokens], 1)
    shape = tree.chain(width) if draft.parents is None else tree.layout(draft.parents)
    is_tree = draft.parents is not None
    out = model.apply(
        params,
        block_tokens,
        cache,
        model.init_block(params, rows.tokens.shape[0], width + 1),
        depths=shape.depths if is_tree else None,
        visible=shape.visible if is_tree else None,
        hidden_layers=drafter.hidden_layers,
    )
    processed = context.process(out.logits, draft.tokens, shape.visible[..., 1:], shape.depths[:, 1:] - 1)
    fault = fault_of(out.logits, processed, model.vocab_size)  # [B, W]
    draft = _match_columns(draft, processed.shape[-1])
    draft = draft._replace(probs=constrain(model.layout, draft.probs, "rows", None, "width"))
    verdict = verifier.verify(context, *_without_faults(draft, processed, fault))
    verdict = verdict._replace(next_token=_or_plain_token(rows, draft, processed[:, 0], verdict.next_token))
    target_log_probs = _of_draft(draft, out.logits, processed, model.vocab_size)

    path, drafted, logits = verdict.path, draft.tokens, out.logits
    if path is not None:
        drafted = jnp.take_along_axis(drafted, path, 1)
        places = jnp.pad(path + 1, ((0, 0), (1, 0)))[..., None]
        logits, processed = (jnp.take_along_axis(x, places, 1) for x in (logits, processed))
        fault = jnp.take_along_axis(fault, places[..., 0], 1)
    # Nothing after a law that does not exist can be trusted: tokens before it stay, the row ends there.
    num_sound = num_leading(fault == Status.ACTIVE)
    num_accepted = jnp.minimum(verdict.num_accepted, num_sound)
    ends = num_sound <= num_accepted
    candidates = jnp.where(
        jnp.arange(drafted.shape[1] + 1)[None] == num_accepted[:, None],
        verdict.next_token[:, None],
        jnp.pad(drafted, ((0, 0), (0, 1))),
    )
    scored = log_probs.of_tokens(logits, processed, candidates, model.vocab_size)
    decision = decide(
        rows,
        candidates,
        num_accepted + jnp.where(ends, 0, 1),
        jnp.where(ends, jnp.take_along_axis(fault, num_accepted[:, None], 1)[:, 0], Status.ACTIVE),
        capacity=capacity,
    )
    num_emitted = decision.num_emitted

    block_path = None if path is None else jnp.pad(path + 1, ((0, 0), (1, 0)))
    lengths = jnp.where(is_active(rows), draft.lengths, 0)
    info = Round(
        tokens=jnp.where(jnp.arange(candidates.shape[1])[None] < num_emitted[:, None], candidates, -1),
        num_emitted=num_emitted,
        num_accepted=jnp.minimum(num_accepted, num_emitted),
        draft_tokens=jnp.where(jnp.arange(width)[None] < lengths[:, None], draft.tokens, -1),
        draft_lengths=lengths,
        draft_probs=jnp.ones(draft.tokens.shape) if draft.probs is None else at_tokens(draft.probs, draft.tokens),
        target_log_probs=target_log_probs,
        log_probs=scored,
        hidden=out.hidden,
        path=path,
    )
    return Settled(model.commit(cache, out.block, num_emitted, block_path), decision.status, info)


def _without_faults(draft: Draft, processed: Array, fault: Array) -> tuple[Draft, Target]:
    """What the verifier judges: a chain ends before the first token that would stand where there is no law, and rules
    that compute with all places at once meet no NaN. The row ends at that place, whatever is drawn there."""
    target = jnp.where((fault == Status.ACTIVE)[..., None], processed, 0.0)
    if draft.parents is None:
        draft = draft._replace(lengths=jnp.minimum(draft.lengths, num_leading(fault == Status.ACTIVE)))
    return draft, Target(target, jax.nn.softmax(target, -1))


def _or_plain_token(rows: Rows, draft: Draft, logits: Array, next_token: Array) -> Array:
    """`next_token` [B], but that of plain decoding where a row has no draft, by the noise of plain decoding.

    The law is the same. But whether others draft must not change the token, and if none does there is no verifier.
    """
    has_none = draft.lengths == 0

    def plain_too() -> Array:
        keys = noise.derive(rows.keys, Role.TARGET, rows.lengths)
        return jnp.where(has_none, sample(keys, logits, rows.sampling), next_token)

    return lax.cond(jnp.any(has_none), plain_too, lambda: next_token)


def _match_columns(draft: Draft, width: int) -> Draft:
    """The draft's law over the target's columns: vocabularies are equal, but paddings may differ."""
    if draft.probs is None or draft.probs.shape[-1] == width:
        return draft
    probs = draft.probs[..., :width]
    return draft._replace(probs=jnp.pad(probs, ((0, 0), (0, 0), (0, width - probs.shape[-1]))))


def _of_draft(draft: Draft, logits: Array, processed: Array, vocab_size: int) -> LogProbs:
    """The target's log-probabilities [B, K] of the draft tokens, each at its parent's place."""
    if draft.parents is not None:
        parents = jnp.broadcast_to(jnp.atleast_2d(draft.parents), draft.tokens.shape)
        logits, processed = (jnp.take_along_axis(x, parents[..., None] + 1, 1) for x in (logits, processed))
        return log_probs.of_tokens(logits, processed, draft.tokens, vocab_size)
    # The last place holds no draft token; with it, these are the sums over the vocabulary that the emitted tokens need.
    scored = log_probs.of_tokens(logits, processed, jnp.pad(draft.tokens, ((0, 0), (0, 1))), vocab_size)
    return LogProbs(*(values[:, :-1] for values in scored))
