"""What the roles must carry without an edit to the loop: each point by a toy part that needs it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toys
from made_up import by_plan

import specjax
from specjax import Draft, Drafter, Origin, Sampling, Verdict, Verifier, controllers, stats, testing
from specjax.decode import prefill
from specjax.types import Extended

VOCAB = tiny.VOCAB
PROMPTS = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0], [7, 8, 9, 0]])
LENGTHS = jnp.array([4, 1, 3])
GIVEN = (PROMPTS, LENGTHS)
# Two levels of two branches: the second token of the first level leads nowhere.
PARENTS = jnp.array([-1, -1, 0, 0])


class Seen(NamedTuple):
    """What a drafter was told by `read`: each token of the text and the target's hidden states at it."""

    tokens: jax.Array  # [B, S]
    hidden: jax.Array  # [B, S, D]
    length: jax.Array  # [B]


def reading(width: int, slots: int = 64) -> dict[str, Any]:
    """`init` and `read` of a drafter that writes down all that it is told, and as what it outlives a call."""

    def init(params, batch, **_):
        return Seen(
            jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch, slots, width)), jnp.zeros((batch,), jnp.int32)
        )

    def read(params, state, context, tokens, hidden, keep):
        at = state.length[:, None] + jnp.arange(tokens.shape[1])[None]
        at = jnp.where(jnp.arange(tokens.shape[1])[None] < keep[:, None], at, slots)
        rows = jnp.arange(len(keep))[:, None]
        return Seen(
            state.tokens.at[rows, at].set(tokens, mode="drop"),
            state.hidden.at[rows, at].set(hidden[0], mode="drop"),
            state.length + keep,
        )

    return {"init": init, "read": read, "hidden_layers": (1,), "learnt": lambda state, rows: state}


def branching(params, state, context, plan):
    """A tree of four tokens: the last token's two likeliest successors by a table, and those of the better one."""
    last = specjax.rows.last_tokens(context.rows, 1)[:, 0]
    first = jax.lax.top_k(params[last], 2)[1]
    second = jax.lax.top_k(params[first[:, 0]], 2)[1]
    tokens = jnp.concatenate([first, second], 1).astype(jnp.int32)
    return Draft(tokens, jnp.where(plan.lengths < 2, 2, 4), None, PARENTS), state


def _walk(context, draft, target):
    """Greedy verification of PARENTS: along the target's own tokens for as long as the tree has them."""
    wanted = jnp.argmax(target.logits, -1).astype(jnp.int32)  # [B, N+1], after each node of the block
    node, path, kept = jnp.zeros_like(draft.lengths), [], jnp.zeros_like(draft.lengths)
    going = draft.lengths > 0
    for _ in range(2):
        choice = jnp.take_along_axis(wanted, node[:, None], 1)
        fits = (draft.tokens == choice) & (PARENTS[None] + 1 == node[:, None]) & going[:, None]
        fits &= jnp.arange(4)[None] < draft.lengths[:, None]
        going, place = jnp.any(fits, -1), jnp.argmax(fits, -1).astype(jnp.int32)
        path.append(place)
        kept, node = kept + going.astype(jnp.int32), jnp.where(going, place + 1, node)
    return Verdict(kept, jnp.take_along_axis(wanted, node[:, None], 1)[:, 0], jnp.stack(path, 1))


PLAIN_ROUNDS_TOO = by_plan([2, 0, 2, 1])._replace(buckets=(0, 2))


@pytest.fixture(scope="module")
def target():
    return tiny.model("llama", 0)


@pytest.mark.parametrize("controller", [controllers.fixed(2), PLAIN_ROUNDS_TOO], ids=["fixed", "with plain rounds"])
def test_a_tree_has_more_nodes_than_places(target, controller, monkeypatch):
    """Catches N taken for K: in statistics, limits, buffers, and what a stream says of a token's origin; hidden states
    of nodes off the accepted path; a prompt, a round or a plain round that the drafter is not told of."""
    model, params = target
    monkeypatch.setattr(prefill, "CHUNK", 3)
    jax.clear_caches()
    table = jnp.asarray(testing.random_table(jax.random.key(1), order=1, vocab_size=VOCAB)[:VOCAB])
    drafter = Drafter(branching, num_nodes=lambda depth: 4, **reading(16))
    options = {"max_new_tokens": jnp.array([14, 15, 9]), "capacity": 24, "controller": controller}
    given = (model, params, drafter, table, *GIVEN)
    out = specjax.generate(*given, **options, verifier=Verifier(_walk, greedy_only=True))
    plain = specjax.autoregressive(model, params, *GIVEN, max_new_tokens=options["max_new_tokens"], capacity=24)
    assert out.new_tokens() == plain.new_tokens()
    assert out.stats.drafted.shape == (3, 2)
    assert 0 < int(out.stats.accepted.sum()) < int(out.stats.drafted.sum())
    assert stats.draft_lengths(out.stats).sum() == int(out.stats.by_longest.sum())

    seen = out.drafter_state
    assert seen.length.tolist() == (out.lengths - 1).tolist()
    whole = _hidden(model, params, out.tokens)
    for row, length in enumerate(seen.length.tolist()):
        assert seen.tokens[row, :length].tolist() == out.tokens[row, :length].tolist()
        np.testing.assert_allclose(seen.hidden[row, :length], whole[row, :length], atol=1e-4)

    chunks = list(specjax.stream(*given, **options, verifier=Verifier(_walk, greedy_only=True)))
    assert [[token for chunk in chunks for token in chunk.tokens[row]] for row in range(3)] == plain.new_tokens()
    ends = set()
    for chunk in chunks[1:]:
        for row, rounds in enumerate(chunk.rounds):
            for one in filter(lambda one: one.tokens and one.num_emitted > len(one.accepted), rounds):
                leads_on = one.accepted == [] or (one.accepted == [0] and len(one.tokens) > 2)
                ends.add((chunk.origins[row][-1], leads_on))
    assert ends == {(Origin.CORRECTED, True), (Origin.BONUS, False)}
    jax.clear_caches()


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, tokens):
    cache, block = model.init_cache(params, 3, 32), model.init_block(params, 3, tokens.shape[1])
    return model.apply(params, jnp.maximum(tokens, 0), cache, block, hidden_layers=(1,)).hidden[0]


def test_trees_for_a_target_that_reads_chains_are_refused():
    """Catches a recurrent target that would read a tree as a chain."""
    drafter = Drafter(branching, num_nodes=lambda depth: 4)
    with pytest.raises(ValueError, match="reads chains only"):
        specjax.generate(toys.recurrent(), toys.recurrent_params(), drafter, None, jnp.array([[1]]))


def test_a_drafter_sees_the_targets_parameters():
    """Catches a context without them, or with a copy that a new call does not replace."""
    model = testing.table_model(1, VOCAB)

    def propose(params, state, context, plan):
        tokens, last = [], specjax.rows.last_tokens(context.rows, 1)[:, 0]
        for _ in range(plan.longest):
            last = jnp.argmax(context.target_params[last], -1).astype(jnp.int32)
            tokens.append(last)
        return Draft(jnp.stack(tokens, 1), plan.lengths, None), state

    drafter = Drafter(propose)
    for seed in range(2):
        params = testing.random_table(jax.random.key(seed), order=1, vocab_size=VOCAB)
        out = specjax.generate(model, params, drafter, None, *GIVEN, max_new_tokens=13, controller=controllers.fixed(3))
        assert out.stats.accepted.tolist() == out.stats.drafted.tolist()


def _bigrams() -> Drafter:
    """Drafts what followed the last token when it was read last, in any row and any call."""

    def init(params, batch, *, learnt, **_):
        return (jnp.full((VOCAB,), -1) if learnt is None else learnt), jnp.full((batch,), VOCAB)

    def read(params, state, context, tokens, hidden, keep):
        after, last = state
        before = jnp.concatenate([last[:, None], tokens], 1)
        at = jnp.where(jnp.arange(tokens.shape[1])[None] < keep[:, None], before[:, :-1], VOCAB)
        return after.at[at].set(tokens, mode="drop"), jnp.take_along_axis(before, keep[:, None], 1)[:, 0]

    def propose(params, state, context, plan):
        tokens, last = [], specjax.rows.last_tokens(context.rows, 1)[:, 0]
        for _ in range(plan.longest):
            last = state[0][last]
            tokens.append(last)
        tokens = jnp.stack(tokens, 1)
        found = jnp.sum(jnp.cumprod((tokens >= 0).astype(jnp.int32), 1), 1)
        return Draft(jnp.maximum(tokens, 0), jnp.minimum(found, plan.lengths), None), state

    return Drafter(propose, init, read, learnt=lambda state, rows: state[0])


def test_a_drafter_that_learns_goes_on_in_the_next_call():
    """Catches a state that is thrown away, or handed to the next call whole, caches of other texts included."""
    model, params = testing.table_model(1, VOCAB), testing.random_table(jax.random.key(3), order=1, vocab_size=VOCAB)
    given = (model, params, _bigrams(), None, *GIVEN)
    first = specjax.generate(*given, max_new_tokens=8)
    assert first.drafter_state.shape == (VOCAB,)
    again = specjax.generate(*given, max_new_tokens=8, drafter_state=first.drafter_state)
    assert again.new_tokens() == first.new_tokens()
    assert again.stats.accepted.sum() > first.stats.accepted.sum()
    chunks = list(specjax.stream(*given, max_new_tokens=8, drafter_state=first.drafter_state))
    assert int(chunks[-1].stats.accepted.sum()) == int(again.stats.accepted.sum())
    with pytest.raises(ValueError, match="learns nothing"):
        specjax.generate(
            model, params, specjax.drafters.draft_model(model), params, *GIVEN, drafter_state=first.drafter_state
        )
    with pytest.raises(ValueError, match=r"drafter_state does not fit.*int32\[13\]"):
        specjax.generate(*given, drafter_state=first.drafter_state[:5])


def _end(state):
    while not state.is_done:
        state, _ = specjax.step(state)
    return specjax.finish(state)


def _extending(model, widths):
    """A recurrent model that reads long texts by their last state alone: no block of a state for every token."""

    def init_block(params, batch, size):
        widths.append(size)
        return model.init_block(params, batch, size)

    def extend(params, tokens, cache, keep, *, logits_at, hidden_layers=()):
        mix, embed, out = params

        def step(carry, token):
            index, state = carry
            new = jnp.tanh(state @ mix + embed[token])
            state = jnp.where((index < keep)[:, None], new, state)
            return (index + 1, state), new

        (_, state), states = jax.lax.scan(step, (jnp.int32(0), cache), tokens.T)
        states = jnp.moveaxis(states, 0, 1)
        chosen = jnp.take_along_axis(states, logits_at[..., None], 1)
        return Extended(state, chosen @ out, tuple(states for _ in hidden_layers))

    return model._replace(init_block=init_block, extend=extend)


def test_a_recurrent_target_reads_long_prompts_by_extend(monkeypatch):
    """Catches a block of states for every token of a prompt, and chunks that lose the state between them; of the draft
    model too, which reads in chunks what it missed."""
    monkeypatch.setattr(prefill, "CHUNK", 16)
    jax.clear_caches()
    widths: list[int] = []
    model, params = _extending(toys.recurrent(), widths), toys.recurrent_params()
    prompts = jax.random.randint(jax.random.key(0), (2, 50), 0, toys.VOCAB)
    lengths = jnp.array([50, 33])
    drafter = specjax.drafters.draft_model(model)
    out = specjax.generate(
        model, params, drafter, params, prompts, lengths, max_new_tokens=12, controller=by_plan([3, 0])
    )
    assert max(widths) == 4
    plain = specjax.autoregressive(toys.recurrent(), params, prompts, lengths, max_new_tokens=12)
    assert out.new_tokens() == plain.new_tokens()
    assert int(out.stats.accepted.sum()) == int(out.stats.drafted.sum()) > 0
    np.testing.assert_allclose(out.log_probs.raw, plain.log_probs.raw, atol=1e-4)
    assert any("extend" in line for line in testing.check_model(model, params))
    forgetful = model._replace(
        extend=lambda p, tokens, cache, keep, **rest: model.extend(p, tokens, 0 * cache, keep, **rest)
    )
    with pytest.raises(AssertionError, match="extend"):
        testing.check_model(forgetful, params)
    jax.clear_caches()


class Encoded(NamedTuple):
    """A table model's cache, and what the encoder made of the inputs: a bias for every token."""

    text: Any
    bias: jax.Array  # [B, V]


def _encoder_decoder():
    inner = testing.table_model(1, VOCAB)

    def init_cache(params, batch, slots, inputs):
        return Encoded(inner.init_cache(params, batch, slots), jnp.sum(jax.nn.one_hot(inputs["ids"], VOCAB), 1))

    def apply(params, tokens, cache, block, **options):
        out = inner.apply(params, tokens, cache.text, block, **options)
        return out._replace(logits=out.logits + 4.0 * cache.bias[:, None])

    def commit(cache, block, keep, path=None):
        return cache._replace(text=inner.commit(cache.text, block, keep, path))

    return inner._replace(init_cache=init_cache, apply=apply, commit=commit, takes_inputs=True)


def test_an_encoder_decoder_reads_its_inputs():
    """Catches inputs that never reach the encoder, the draft model's own, or the row that they belong to."""
    model, params = _encoder_decoder(), testing.random_table(jax.random.key(1), order=1, vocab_size=VOCAB)
    inputs = {"ids": jnp.array([[1, 1], [2, 2], [3, 4]])}
    given = (model, params, specjax.drafters.draft_model(model), params)
    options = {"max_new_tokens": 9, "sampling": Sampling(1.0)}
    out = specjax.generate(*given, *GIVEN, **options, inputs=inputs, verifier=specjax.verify.coupled())
    plain = specjax.autoregressive(model, params, *GIVEN, **options, inputs=inputs)
    assert out.new_tokens() == plain.new_tokens()
    assert int(out.stats.accepted.sum()) == int(out.stats.drafted.sum())  # the draft model read the same inputs
    one = specjax.autoregressive(
        model, params, PROMPTS[2:], LENGTHS[2:], **options, inputs={"ids": inputs["ids"][2:]}, seeds=jnp.array([2])
    )
    assert one.new_tokens()[0] == plain.new_tokens()[2]
    state = specjax.init(*given, *GIVEN, **options, inputs=inputs, verifier=specjax.verify.coupled())
    late = {"inputs": {"ids": jnp.array([[7, 7]])}, "seed": 8, **options}
    end = _end(specjax.admit(state, 0, jnp.array([4]), **late))
    alone = specjax.autoregressive(
        model, params, jnp.array([[4]]), **options, inputs=late["inputs"], seeds=jnp.array([8])
    )
    assert end.new_tokens()[0] == alone.new_tokens()[0]
    with pytest.raises(ValueError, match="pass inputs="):
        specjax.autoregressive(model, params, *GIVEN)
    with pytest.raises(ValueError, match="takes no inputs"):
        specjax.autoregressive(testing.table_model(1, VOCAB), params, *GIVEN, inputs=inputs)
    with pytest.raises(ValueError, match=r"inputs\['ids'\] must have shape"):
        specjax.autoregressive(model, params, *GIVEN, inputs={"ids": jnp.zeros((2, 1), jnp.int32)})
    assert len(testing.check_model(model, params, inputs=inputs)) == 7
