"""Other people's modules as Models: the module's own tokens, in the fastest way that its cache allows."""

from __future__ import annotations

import flax_modules
import jax
import jax.numpy as jnp
import lowering
import numpy as np
import optax
import pytest
import tiny
from flax import linen, nnx
from jax._src import test_util as jtu

import specjax
from specjax import adapters, testing
from specjax.aot import hlo
from specjax.decode import prefill
from specjax.types import Drafter

VOCAB = flax_modules.VOCAB
PROMPTS = np.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0]])
LENGTHS = np.array([4, 1, 2])
EXPECTED = {
    flax_modules.SharedCursor: ("at-end", True),
    flax_modules.RowCursors: ("per-row", False),
    flax_modules.LoneCursor: ("row-by-row", False),
    flax_modules.SlidingBySlot: ("row-by-row", True),
    flax_modules.Stack: ("uncached", False),
    flax_modules.Flat: ("uncached", True),
    flax_modules.Held: ("at-end", True),
}


def _linen(kind):
    ids, mask, key = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 1, 3, 3), bool), jax.random.key(0)
    inputs = (ids, ids, mask) if kind is flax_modules.Flat else (ids, ids, None, mask)
    module = kind()
    return module, module.init({"params": key, "dropout": key}, *inputs)


@pytest.fixture(scope="module")
def adapt():
    """Adapted modules by class and strategy, each tried once."""
    made = {}

    def one(kind, strategy=None):
        if (kind, strategy) not in made:
            if issubclass(kind, linen.Module):
                made[kind, strategy] = adapters.from_linen(*_linen(kind), max_positions=40, strategy=strategy)
            else:
                made[kind, strategy] = adapters.from_nnx(kind(nnx.Rngs(0)), strategy=strategy)
        return made[kind, strategy]

    return one


def _own_logits(kind):
    """The module's logits of one text, called as its author would."""
    if kind is flax_modules.Flat:
        module, variables = _linen(kind)

        def call(ids):
            mask = linen.make_causal_mask(ids)
            return module.apply(variables, ids, jnp.arange(ids.shape[1])[None], mask, deterministic=True)
    elif kind is flax_modules.Held:
        module, variables = _linen(kind)

        def call(ids):
            return module.apply(variables, ids, jnp.arange(ids.shape[1])[None], None, linen.make_causal_mask(ids))[1]
    else:
        module = kind(nnx.Rngs(0))
        module.eval()

        def call(ids):
            if kind is flax_modules.Stack:
                return module(ids)
            if kind is flax_modules.RowCursors:
                return module(ids, module.init_cache(*ids.shape))[0]
            if kind is flax_modules.LoneCursor:
                return module(ids)[0]
            mask = jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool))
            return module(ids, jnp.arange(ids.shape[1])[None], None, mask)[0]

    return lambda text: call(jnp.asarray([text]))[0]


def _greedy(kind, count):
    """By hand: the whole text again for each token."""
    logits, texts = _own_logits(kind), []
    for prompt, length in zip(PROMPTS.tolist(), LENGTHS.tolist(), strict=True):
        text = prompt[:length]
        for _ in range(count):
            text.append(int(jnp.argmax(logits(text)[-1])))
        texts.append(text[length:])
    return texts


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_speculation_gives_the_modules_own_tokens(kind, adapt):
    """Catches a cache that is misread in any way: rows of different lengths, rejected tokens, catching up. The draft is
    the module itself with other parameters, so that about half of its tokens are right."""
    adapted = adapt(kind)
    assert (adapted.strategy, adapted.model.trees) == EXPECTED[kind]
    noisy = jax.tree.map(lambda leaf: leaf * 0.9 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, adapted.params)
    out = specjax.generate(
        adapted.model, adapted.params, specjax.drafters.draft_model(adapted.model), noisy, PROMPTS, LENGTHS,
        max_new_tokens=12, controller=specjax.controllers.fixed(3),
    )  # fmt: skip
    assert out.new_tokens() == _greedy(kind, 12)
    assert int(out.stats.accepted.sum()) > 0
    assert int(out.stats.accepted.sum()) < int(out.stats.tested.sum())


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_an_adapted_module_keeps_the_contract(kind, adapt):
    """Catches whatever else a Model promises: an open block, chosen places, trees and paths, capacity."""
    adapted = adapt(kind)
    checks = testing.check_model(adapted.model, adapted.params)
    assert len(checks) == 6 + adapted.model.trees


@pytest.mark.parametrize("kind", [flax_modules.SharedCursor, flax_modules.LoneCursor], ids=lambda kind: kind.__name__)
def test_sampled_text_follows_the_modules_distribution(kind, adapt):
    """Catches a wrong distribution at temperature 1. 20,000 sequences of 2 tokens over 3 rounds, false alarms 1e-6; the
    distribution is that of the module without its cache."""
    adapted, plain = adapt(kind), adapt(kind, "uncached")
    samples, prompt, length = 20_000, [3, 1], 2
    settings = specjax.Sampling(temperature=1.0, top_k=6)
    probs = testing.exact_sequence_probs(plain.model, plain.params, prompt, length, sampling=settings)
    table = testing.random_table(jax.random.key(4), order=1, vocab_size=VOCAB)
    out = specjax.generate(
        adapted.model, adapted.params, specjax.drafters.draft_model(testing.table_model(1, VOCAB)), table,
        jnp.tile(jnp.array([prompt]), (samples, 1)), max_new_tokens=length, sampling=settings,
        controller=specjax.controllers.fixed(1),
    )  # fmt: skip
    testing.assert_same_distribution(testing.count_sequences(out.tokens, len(prompt), length, VOCAB), probs)


def test_long_prompts_in_chunks(adapt, monkeypatch):
    """Catches chunks that stand where live tokens are: the last slots of a cache that is nearly full."""
    adapted = adapt(flax_modules.SharedCursor)
    prompts = jax.random.randint(jax.random.key(4), (3, 23), 0, VOCAB)
    lengths = jnp.array([23, 8, 9])
    whole = specjax.autoregressive(adapted.model, adapted.params, prompts, lengths, max_new_tokens=3, capacity=27)
    monkeypatch.setattr(prefill, "CHUNK", 8)
    chunked = specjax.autoregressive(adapted.model, adapted.params, prompts, lengths, max_new_tokens=3, capacity=26)
    assert whole.new_tokens() == chunked.new_tokens()


@pytest.mark.parametrize("kind", [flax_modules.SharedCursor, flax_modules.Stack], ids=lambda kind: kind.__name__)
def test_an_optimiser_step_compiles_nothing(kind):
    """Catches parameters that are captured: a training loop would generate with those of its first step."""
    module = kind(nnx.Rngs(0))
    adapted = adapters.from_nnx(module)
    draft = specjax.drafters.draft_model(adapted.model)

    def run(params):
        return specjax.generate(adapted.model, params, draft, params, PROMPTS, LENGTHS, max_new_tokens=6)

    module.train()
    optimizer = nnx.Optimizer(module, optax.sgd(1.0), wrt=nnx.Param)
    before = run(nnx.state(module)).new_tokens()

    def loss(module):
        ids = jnp.array([[1, 2, 3, 4]])
        if kind is flax_modules.Stack:
            return jnp.sum(module(ids)[..., 0])
        return jnp.sum(module(ids, jnp.arange(4)[None], None, jnp.tril(jnp.ones((1, 4, 4), bool)))[0][..., 0])

    optimizer.update(module, nnx.grad(loss)(module))
    with jtu.count_jit_compilation_cache_miss() as misses:
        after = run(nnx.state(module)).new_tokens()
    assert misses() == 0
    assert before != after
    assert run(nnx.state(module, nnx.Param)).new_tokens() == after  # what is no Param changes nothing here


def test_an_adapted_module_and_a_model_of_ours(adapt):
    """Catches parts that fit their own kind only: either may draft for the other."""
    ours, our_params = tiny.model("llama", vocab_size=VOCAB)
    theirs = adapt(flax_modules.SharedCursor)
    pairs = [(ours, our_params, theirs.model, theirs.params), (theirs.model, theirs.params, ours, our_params)]
    for target, params, draft, draft_params in pairs:
        draft = specjax.drafters.draft_model(draft)
        out = specjax.generate(target, params, draft, draft_params, PROMPTS, LENGTHS, max_new_tokens=8)
        plain = specjax.autoregressive(target, params, PROMPTS, LENGTHS, max_new_tokens=8)
        assert out.new_tokens() == plain.new_tokens()


def test_a_cache_in_the_modules_own_variables():
    """Catches a `call` that isn't used, and caches that can only be had through one."""
    module = flax_modules.OwnVariables(nnx.Rngs(0))

    def call(module, ids, cache):
        nnx.update(module, cache)
        return module(ids), nnx.state(module, nnx.Cache)

    def init_cache(batch, slots):
        return nnx.state(flax_modules.OwnVariables(nnx.Rngs(0), batch, slots), nnx.Cache)

    adapted = adapters.from_nnx(module, call=call, init_cache=init_cache)
    assert adapted.strategy == "per-row"
    out = specjax.autoregressive(adapted.model, adapted.params, PROMPTS, LENGTHS, max_new_tokens=12)
    assert out.new_tokens() == _greedy(flax_modules.RowCursors, 12)


def test_why_not_faster_is_said(adapt):
    """Catches a choice that the user can't follow."""
    shared = adapt(flax_modules.SharedCursor).describe()
    assert "row 1's logits changed when row 0's length changed: this cache keeps one cursor for all rows" in shared
    assert "it takes no mask" in adapt(flax_modules.LoneCursor).describe()
    assert "It takes no cache" in adapt(flax_modules.Stack).describe()

    class Homeless(flax_modules.SharedCursor):
        init_cache = None

    assert "has no init_cache: pass init_cache=" in adapters.from_nnx(Homeless(nnx.Rngs(0))).describe()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (flax_modules.Mixing, "row 0's logits changed when row 1's tokens changed"),
        (flax_modules.Bidirectional, "the module is not causal"),
        (flax_modules.Blind, "do not depend on earlier tokens"),
        (flax_modules.Broken, "not finite"),
        (flax_modules.NoLogits, "returned no logits: expected an array .B, T, V. = .3, 12, V."),
        (flax_modules.Vision, "also wants images: pass takes="),
        (flax_modules.Loud, "is dropout on"),
        (flax_modules.Fails, "could not be called.*out of luck"),
    ],
)
def test_modules_that_cannot_be_used(kind, message):
    """Catches garbage taken for a language model."""
    module = kind(nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        adapters.from_nnx(module)


class _Recurrent(flax_modules.LoneCursor):
    def init_cache(self, batch_size, max_len):
        return {**super().init_cache(batch_size, max_len), "state": jnp.zeros((batch_size, 4))}


class _Ring(flax_modules.LoneCursor):
    def init_cache(self, batch_size, max_len):
        return super().init_cache(batch_size, min(max_len, 100))


def test_caches_that_cannot_be_used(adapt):
    """Catches a state that can't be rolled back, and a ring that would forget live tokens once a text is long."""
    adapted = adapters.from_nnx(_Recurrent(nnx.Rngs(0)))
    assert adapted.strategy == "uncached"
    assert "recurrent" in adapted.describe()
    ring = adapters.from_nnx(_Ring(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="has 100 slots where"):
        specjax.autoregressive(ring.model, ring.params, PROMPTS, max_new_tokens=200)


def test_rounding_hides_no_wrong_cache():
    """Catches a tolerance made for bfloat16 that lets a cache through whose window is in the wrong place."""
    module = flax_modules.Faint(nnx.Rngs(0))
    nnx.update(module, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(module)))
    with jax.numpy_dtype_promotion("standard"):  # sines are in float32
        adapted = adapters.from_nnx(module, init_cache=lambda rows, slots: module.init_cache(rows, slots, jnp.float32))
    assert adapted.strategy == "row-by-row", adapted.describe()


def test_a_table_of_positions_ends():
    """Catches a round that reaches past the table: draft tokens are NaN there, and a masked NaN spoils the others."""
    adapted = adapters.from_nnx(flax_modules.Table(nnx.Rngs(0)), max_positions=40)
    plain = adapters.from_nnx(flax_modules.Table(nnx.Rngs(0)), max_positions=40, strategy="uncached")
    draft = specjax.drafters.draft_model(adapted.model)
    parts = (adapted.model, adapted.params, draft, adapted.params, PROMPTS, LENGTHS)
    with pytest.raises(ValueError, match="has 40: make capacity smaller by 6"):
        specjax.generate(*parts, max_new_tokens=60)
    out = specjax.generate(*parts, max_new_tokens=60, capacity=34)
    whole = specjax.autoregressive(plain.model, plain.params, PROMPTS, LENGTHS, max_new_tokens=60)
    assert [len(new) for new in whole.new_tokens()] == [36, 39, 38]  # to the table's last place
    assert all(new[: len(short)] == short for new, short in zip(whole.new_tokens(), out.new_tokens(), strict=True))
    assert out.lengths.tolist() == [34, 34, 34]


def test_bad_arguments():
    """Catches mistakes that would surface far away."""
    module = flax_modules.SharedCursor(nnx.Rngs(0))
    takes = adapters.Takes(tokens="tokens", positions="positions", mask="attention_mask")
    for arguments, message in [
        ({"vocab_size": 12}, "vocab_size must be in 1..11"),
        ({"strategy": "fast"}, "strategy must be one of per-row"),
        ({"strategy": "per-row"}, "not right for this module. Not per-row: row 1's logits changed"),
        ({"takes": takes._replace(mask="masks")}, "takes.mask is 'masks', but the module takes"),
        ({"takes": takes}, "could not be called"),  # it wants its cache, None or not
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.from_nnx(module, **arguments)
    with pytest.raises(ValueError, match="For a Linen module use from_linen"):
        adapters.from_nnx(flax_modules.Held())
    with pytest.raises(ValueError, match="For an NNX module use from_nnx"):
        adapters.from_linen(module, {"params": {}})
    with pytest.raises(ValueError, match="a dict with 'params' in it"):
        adapters.from_linen(flax_modules.Held(), {})


def test_parameters_of_another_module(adapt):
    """Catches the state of half a module, which would be merged into something else."""
    adapted = adapt(flax_modules.Stack)
    other = nnx.state(flax_modules.SharedCursor(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"have 9 arrays, the module has 19 or 23: pass nnx\.state"):
        specjax.autoregressive(adapted.model, other, PROMPTS, max_new_tokens=2)


def test_drafters_that_read_hidden_states_are_refused(adapt):
    """Catches a feature-level drafter that would get no features."""
    adapted = adapt(flax_modules.Stack)
    drafter = Drafter(propose=lambda: None, hidden_layers=(1,))
    with pytest.raises(ValueError, match="reads the target's hidden states"):
        specjax.generate(adapted.model, adapted.params, drafter, (), PROMPTS)


@pytest.mark.parametrize(
    "kind",
    [flax_modules.SharedCursor, flax_modules.RowCursors, flax_modules.LoneCursor],
    ids=lambda kind: kind.__name__,
)
def test_no_cache_is_copied_in_the_compiled_loop(kind, adapt):
    """Catches a write that may run before the last read: XLA would copy the module's cache in every round."""
    adapted = adapt(kind)
    draft = specjax.drafters.draft_model(testing.table_model(1, VOCAB))
    table = testing.random_table(jax.random.key(4), order=1, vocab_size=VOCAB)
    controller = specjax.controllers.fixed(3)
    lowered = lowering.lowered(
        adapted.model, adapted.params, draft, table, PROMPTS, LENGTHS, 400, controller=controller
    )
    looped = [step.instruction for step in hlo.parse(lowered.compile().as_text()).walk() if step.loops]
    slots = PROMPTS.shape[1] + 400 + 4  # the draft's table keeps no cache, so this is the module's
    inside = [item for item in looped if any(len(shape.dims) >= 4 and slots in shape.dims for shape in item.shapes)]
    assert any("dynamic-update-slice" in item.text or "scatter" in item.text for item in inside)
    assert not [item.text for item in inside if item.op == "copy"]
