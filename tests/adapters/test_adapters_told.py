"""What is said of modules whose cache or positions are not as they should be: the cause first, then what to do."""

from __future__ import annotations

import flax_modules
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import specjax
from specjax import adapters

PROMPTS = np.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0]])
LENGTHS = np.array([4, 1, 2])


class _UntoldLinen(flax_modules.Held):
    def init_cache(self, config, n):
        return super().init_cache(config["rows"], n)


def _untold_linen():
    ids = jnp.zeros((2, 3), jnp.int32)
    module = _UntoldLinen()
    return module, module.init(jax.random.key(0), ids, ids, None, linen.make_causal_mask(ids))


class _NoFunction(flax_modules.SharedCursor):
    init_cache = 7


class _NeedsACache(flax_modules.RowCursors):
    def init_cache(self, config, n):
        return super().init_cache(config["rows"], n)


def test_an_init_cache_whose_arguments_cannot_be_told():
    """Catches a module that is refused for a function that the chosen strategy never calls."""
    for strategy in ("uncached", None):
        linen_module, variables = _untold_linen()
        for adapted in (
            adapters.from_nnx(flax_modules.Untold(nnx.Rngs(0)), strategy=strategy),
            adapters.from_linen(linen_module, variables, strategy=strategy),
        ):
            assert adapted.strategy == "uncached"
            assert (
                "The argument names of its init_cache(config, n) do not say which are rows and slots"
                in adapted.notes[0]
            )
            assert "pass init_cache=lambda batch, slots: module.init_cache(...)" in adapted.describe()
    assert "its init_cache do not say which are rows and slots" in adapters.from_nnx(_NoFunction(nnx.Rngs(0))).notes[0]
    unused = adapters.from_nnx(
        flax_modules.Stack(nnx.Rngs(0)), init_cache=lambda batch, slots: 1 / 0, strategy="uncached"
    )
    assert unused.strategy == "uncached"
    module = flax_modules.Untold(nnx.Rngs(0))
    told = adapters.from_nnx(module, init_cache=lambda batch, slots: module.init_cache({"rows": batch}, slots))
    assert told.strategy == "at-end"
    with pytest.raises(ValueError, match=r"could not be called.*init_cache\(config, n\) do not say which are rows"):
        adapters.from_nnx(_NeedsACache(nnx.Rngs(0)))


@pytest.mark.parametrize(("name", "given"), [("max_positions", -1), ("max_positions", 4.5), ("vocab_size", "8")])
def test_a_number_that_is_none_is_refused_before_anything_is_tried(name, given):
    """Catches positions of -1, which no text fits into, and of 4.5, which no array has."""
    linen_module, variables = _untold_linen()
    for adapt in (
        lambda: adapters.from_nnx(flax_modules.Stack(nnx.Rngs(0)), **{name: given}),
        lambda: adapters.from_linen(linen_module, variables, **{name: given}),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be .*1 or more, got {given!r}"):
            adapt()


def test_a_cache_that_ignores_the_slots_asked_for():
    """Catches "recurrent", said of keys and values that are only too many or too few; the first note is the reason."""
    fixed = adapters.from_nnx(flax_modules.FixedSlots(nnx.Rngs(0)))
    assert fixed.strategy == "uncached"
    assert fixed.notes[0].startswith("Its init_cache ignores the number of slots that it is asked for: 48 and 64 slots")
    assert "['k'] float32[2, 100, 2, 8]" in fixed.notes[0]
    assert len(fixed.notes) == 1  # said once, not once for each strategy
    with pytest.raises(ValueError, match=r"module\. Its init_cache ignores the number of slots"):
        adapters.from_nnx(flax_modules.FixedSlots(nnx.Rngs(0)), strategy="at-end")

    class Needed(flax_modules.FixedSlots):
        def __call__(self, tokens, positions, cache, attention_mask):
            return super().__call__(tokens, positions, dict(cache), attention_mask)

    with pytest.raises(ValueError, match=r"^Its init_cache ignores the number of slots.*could not be called"):
        adapters.from_nnx(Needed(nnx.Rngs(0)))


def test_shapes_that_no_longer_fit_past_the_trial():
    """Catches a table that ends past the trial's texts: the error names an addition in the module, not a cure."""
    module = flax_modules.Sliced(nnx.Rngs(0))
    adapted = adapters.from_nnx(module)
    with pytest.raises(ValueError, match=r"failed at 6\d places.*pass max_positions=.*It said: TypeError") as caught:
        specjax.autoregressive(adapted.model, adapted.params, PROMPTS, LENGTHS, max_new_tokens=60)
    assert isinstance(caught.value.__cause__, TypeError)
    told = adapters.from_nnx(module, max_positions=40)
    out = specjax.autoregressive(told.model, told.params, PROMPTS, LENGTHS, max_new_tokens=60)
    assert [len(new) for new in out.new_tokens()] == [36, 39, 38]  # to the table's last place

    square = flax_modules.SquareMask(nnx.Rngs(0))
    adapted = adapters.from_nnx(square)
    assert adapted.strategy == "at-end"
    with pytest.raises(ValueError, match="pass max_positions="):
        specjax.autoregressive(adapted.model, adapted.params, PROMPTS, LENGTHS, max_new_tokens=60)
    told = adapters.from_nnx(square, max_positions=40)
    with pytest.raises(ValueError, match=r"max_positions=40: make capacity smaller by 1\."):
        specjax.autoregressive(told.model, told.params, PROMPTS, LENGTHS, max_new_tokens=60)
    out = specjax.autoregressive(told.model, told.params, PROMPTS, LENGTHS, max_new_tokens=60, capacity=39)
    assert out.lengths.tolist() == [39, 39, 39]

    def limited(batch, slots):
        if slots > 70:
            raise TypeError("at most 70")
        return flax_modules.LoneCursor.init_cache(module, batch, slots)

    adapted = adapters.from_nnx(flax_modules.LoneCursor(nnx.Rngs(0)), init_cache=limited)
    assert adapted.strategy == "row-by-row"
    with pytest.raises(ValueError, match=r"pass max_positions=.*at most 70"):
        specjax.autoregressive(adapted.model, adapted.params, PROMPTS, LENGTHS, max_new_tokens=80)


class _DecodeMode(nnx.Module):
    """Flax's own attention in decode mode: its cache Variables exist only after init_cache."""

    def __init__(self, rngs):
        self.embed, self.out = (
            nnx.Embed(flax_modules.VOCAB, 16, rngs=rngs),
            nnx.Linear(16, flax_modules.VOCAB, rngs=rngs),
        )
        self.attention = nnx.MultiHeadAttention(2, 16, decode=True, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.attention(self.embed(tokens)))


def test_cache_variables_that_the_module_must_hold():
    """Catches an adapter that speaks of subgraphs where the module has not got its cache yet, and a module whose cache
    is in its Variables but handed to nobody."""

    def call(module, ids, cache):
        nnx.update(module, cache)
        return module(ids), nnx.state(module, nnx.Cache)

    def init_cache(batch, slots):
        module = _DecodeMode(nnx.Rngs(0))
        module.attention.init_cache((batch, slots, 16))
        return nnx.state(module, nnx.Cache)

    with pytest.raises(
        ValueError, match=r"does not hold \(attention\.cache_index, .*adapt a module that already holds"
    ):
        adapters.from_nnx(_DecodeMode(nnx.Rngs(0)), call=call, init_cache=init_cache)
    silent = adapters.from_nnx(flax_modules.OwnVariables(nnx.Rngs(0), 3, 40)).describe()
    assert "keeps a cache in its own Variables (ends, keys, values)" in silent
    assert "pass call=, a function (module, tokens, ..., cache) that does nnx.update(module, cache)" in silent
