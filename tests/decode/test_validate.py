"""Bad input: a ValueError that says what was expected, what came, and what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import models, testing, text

MODEL = testing.table_model(1, 8)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
DRAFTER = specjax.drafters.draft_model(MODEL)
PROMPTS = jnp.array([[1, 2, 3], [4, 5, 0]])
GPT2 = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 10}

CASES = {
    "one row": ({"prompts": jnp.array([1, 2])}, r"\[B, P\].*prompts\[None\]"),
    "no rows": ({"prompts": jnp.zeros((0, 3), jnp.int32)}, "empty"),
    "no columns": ({"prompts": jnp.zeros((2, 0), jnp.int32)}, "empty"),
    "floats": ({"prompts": PROMPTS.astype(jnp.float32)}, "integers.*float32"),
    "lengths for other rows": ({"prompt_lengths": jnp.array([1, 2, 3])}, r"prompt_lengths.*\[2\].*\(3,\)"),
    "float lengths": ({"prompt_lengths": jnp.array([1.0, 2.0])}, "prompt_lengths.*float32"),
    "empty prompt": ({"prompt_lengths": jnp.array([3, 0])}, "row 1 is empty.*BOS"),
    "length past the width": ({"prompt_lengths": jnp.array([3, 4])}, r"prompt_lengths\[1\] = 4.*3 columns"),
    "id too large": ({"prompts": jnp.array([[1, 2, 3], [4, 8, 0]])}, r"prompts\[1, 1\] = 8.*0\.\.7.*tokenizer"),
    "negative id": ({"prompts": jnp.array([[1, -1, 3]])}, r"prompts\[0, 1\] = -1"),
    "prompt past the capacity": ({"capacity": 2}, "3 columns.*capacity=2"),
    "no tokens asked": ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
    "limits for other rows": ({"max_new_tokens": jnp.array([1, 2, 3])}, "max_new_tokens"),
    "negative temperature": ({"sampling": specjax.Sampling(-1.0)}, r"temperature.*0 or more.*got -1\.0"),
    "nan temperature": ({"sampling": specjax.Sampling(float("nan"))}, "temperature.*finite"),
    "one row's temperature": ({"sampling": specjax.Sampling(jnp.array([1.0, -2.0]))}, r"got -2\.0"),
    "top_p zero": ({"sampling": specjax.Sampling(1.0, top_p=0.0)}, r"top_p must be in \(0, 1\].*got 0\.0"),
    "top_p above one": ({"sampling": specjax.Sampling(1.0, top_p=1.5)}, r"got 1\.5"),
    "top_k negative": ({"sampling": specjax.Sampling(1.0, top_k=-1)}, "top_k must be 0 or more"),
    "min_p one": ({"sampling": specjax.Sampling(1.0, min_p=1.0)}, r"min_p must be in \[0, 1\)"),
    "settings for other rows": ({"sampling": specjax.Sampling(jnp.ones(3))}, r"temperature.*\[2\], got \(3,\)"),
    "not a Sampling": ({"sampling": {"temperature": 1}}, "specjax.Sampling, got dict"),
    "many keys": ({"key": jax.random.split(jax.random.key(0), 2)}, "one PRNG key"),
    "an int for a key": ({"key": 3}, r"jax\.random\.key\(seed\)"),
    "text for a key": ({"key": "a"}, r"one PRNG key, got str: .*jax\.random\.key\(seed\)"),
    "text for a limit": ({"max_new_tokens": "3"}, r"max_new_tokens must hold whole numbers .*got text, '3': pass int"),
    "text for seeds": ({"seeds": "3"}, "seeds must hold whole numbers"),
    "text for lengths": ({"prompt_lengths": ["3", "2"]}, "prompt_lengths must hold whole numbers"),
    "text for stop tokens": ({"stop_tokens": ["a"]}, "stop_tokens must hold token ids.*encode it first"),
    "a limit that is none": ({"max_new_tokens": 2**40}, "max_new_tokens=1099511627776 sets no limit.*capacity="),
    "a filler past 64 bits": ({"pad_token": 10**30}, r"pad_token must be in .*got 1000000000000000000000000000000\."),
    "a temperature past float32": (
        {"sampling": specjax.Sampling(1e300)},
        r"temperature must be finite.*got 1e\+300 \(inf in float32\)",
    ),
    "a penalty past float32": ({"sampling": specjax.Sampling(presence_penalty=1e39)}, "presence_penalty.*finite"),
    "a penalty that float32 rounds to 0": ({"sampling": specjax.Sampling(repetition_penalty=1e-60)}, "above 0.*1e-60"),
    "a complex temperature": ({"sampling": specjax.Sampling(1j)}, "temperature must hold numbers, got complex128"),  # type: ignore[arg-type]
    "a bias past float32": (
        {"sampling": specjax.Sampling(logit_bias=np.full(8, -1e39))},
        "logit_bias holds NaN.*float32",
    ),
    "a bias of text": ({"sampling": specjax.Sampling(logit_bias=np.array(list("abcdefgh")))}, "must hold numbers"),
    "rounds that never end": ({"rounds_per_test": 2**31 - 1}, r"rounds_per_test must be in 1\.\.65536, got 2147483647"),
    "a capacity past int32": ({"capacity": 2**31}, r"capacity must be in 1\.\.1073741824, got 2147483648"),
    "stop token too large": ({"stop_tokens": [8]}, r"stop_tokens holds 8.*0\.\.7"),
    "stop tokens for other rows": ({"stop_tokens": np.zeros((3, 1), np.int32)}, r"\[n\] or \[B, n\]"),
    "seeds for other rows": ({"seeds": jnp.arange(3)}, "seeds"),
    "a boolean temperature": ({"sampling": specjax.Sampling(True)}, "temperature must hold numbers, got bool"),
    "a fractional filler": ({"pad_token": 0.5}, r"pad_token must be one integer, got 0\.5"),
    "a filler for each row": ({"pad_token": jnp.zeros(2, jnp.int32)}, "pad_token must be one integer"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", ["generate", "autoregressive"])
def test_bad_arguments_are_refused_with_a_remedy(case, call):
    """Catches bad input that becomes silent garbage, or an error from deep inside XLA."""
    changes, message = CASES[case]
    options = {"prompts": PROMPTS, "max_new_tokens": 4, **changes}
    if call == "generate":
        options |= {"drafter": DRAFTER, "drafter_params": TABLE}
    with pytest.raises(ValueError, match=message):
        getattr(specjax, call)(model=MODEL, params=TABLE, **options)


def test_parts_that_do_not_fit():
    """Catches a draft model with another vocabulary, K below 1, and a greedy verifier asked to sample."""
    other = specjax.drafters.draft_model(testing.table_model(1, 9))
    with pytest.raises(ValueError, match=r"vocabularies differ.*9 ids.*8"):
        specjax.generate(MODEL, TABLE, other, TABLE, PROMPTS)
    with pytest.raises(ValueError, match=r"in 1\.\.65535, got 0.*autoregressive"):
        specjax.controllers.fixed(0)
    with pytest.raises(ValueError, match=r"temperature 0 only.*rejection"):
        specjax.generate(
            MODEL, TABLE, DRAFTER, TABLE, PROMPTS, sampling=specjax.Sampling(0.5), verifier=specjax.verify.greedy()
        )


def test_the_wrong_kind_of_part():
    """Catches an AttributeError from deep inside where a model was passed as loaded, or a maker was not called."""
    draft = models.random(GPT2, jax.random.key(0))
    for changes, message in (
        ({"model": draft}, r"pass the `\.model`"),
        ({"drafter": MODEL}, "drafters.draft_model"),
        ({"drafter": specjax.drafters.draft_model}, "drafters.draft_model"),
        ({"verifier": specjax.verify.rejection}, r"verify\.rejection\(\)"),
        ({"controller": 3}, r"controllers\.fixed\(5\)"),
    ):
        options = {"model": MODEL, "drafter": DRAFTER, **changes}
        with pytest.raises(ValueError, match=message):
            specjax.generate(params=TABLE, drafter_params=TABLE, prompts=PROMPTS, **options)
    with pytest.raises(ValueError, match="another model's"):
        specjax.autoregressive(draft.model, {"only": TABLE}, PROMPTS, max_new_tokens=2)
    with pytest.raises(ValueError, match="list of strings"):
        text.encode(None, "one text")
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda: specjax.autoregressive(MODEL, TABLE, PROMPTS, max_new_tokens=2).new_tokens())()


def test_models_with_a_last_position():
    """Catches positions past the end of a learned table, which a gather clamps without a word."""
    loaded = models.random(GPT2, jax.random.key(0))
    with pytest.raises(ValueError, match=r"capacity 11.*10 positions"):
        specjax.autoregressive(loaded.model, loaded.params, PROMPTS, capacity=11)
    out = specjax.autoregressive(loaded.model, loaded.params, PROMPTS, max_new_tokens=50)
    assert out.lengths.tolist() == [10, 10]
    assert [specjax.Status(value).name for value in out.status.tolist()] == ["CACHE_FULL"] * 2


def test_a_traced_limit_needs_a_capacity():
    """Catches a tracer that leaks into a shape."""
    with pytest.raises(ValueError, match=r"max_new_tokens is traced.*capacity="):
        jax.jit(lambda n: specjax.autoregressive(MODEL, TABLE, PROMPTS, max_new_tokens=n))(3)


def test_numbers_are_taken_as_arrays_hold_them():
    """Catches NumPy's and JAX's integers refused or without a hash, and a traced filler that must be known."""
    wanted = _texts(capacity=9, rounds_per_test=2, pad_token=7, controller=specjax.controllers.fixed(2))
    for kind in (np.array, jnp.int32):
        assert specjax.controllers.fixed(kind(2)) is specjax.controllers.fixed(2)
        found = _texts(capacity=kind(9), rounds_per_test=kind(2), pad_token=kind(7))
        assert (found.tokens == wanted.tokens).all()
    traced = jax.jit(lambda token, stop: _texts(pad_token=token, stop_tokens=[stop, -1]).tokens)(7, 99)
    assert (traced == wanted.tokens).all()
    with pytest.raises(ValueError, match="capacity must be known while tracing"):
        jax.jit(lambda capacity: _texts(capacity=capacity))(9)


HUGE = (2**31 - 1, 2**31, 2**32, 2**33 + 5, 2**63, 2**70)
NO_LIMIT = {
    "max_new_tokens": {"capacity": 9},
    "max_draft_len": {"capacity": 9},
    "top_k": {"capacity": 9},
    "min_new_tokens": {"capacity": 9},
}
IN_A_RANGE = (
    "seeds",
    "pad_token",
    "capacity",
    "rounds_per_test",
    "stop_tokens",
    "prompts",
    "prompt_lengths",
    "bad_words",
)
SAMPLING = ("top_k", "min_new_tokens", "bad_words")
SHAPES = {"seeds": (2,), "prompt_lengths": (2,), "stop_tokens": (1,), "bad_words": (1,), "prompts": (2, 3)}


def _texts(**changes):
    sampling = {name: changes.pop(name) for name in SAMPLING if name in changes}
    options = {"prompts": PROMPTS, "max_new_tokens": 4, "capacity": 9, "max_draft_len": 2, **changes}
    return specjax.generate(
        MODEL, TABLE, DRAFTER, TABLE, sampling=specjax.Sampling(1.0, **{"top_k": 2, "min_new_tokens": 1, **sampling}),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", NO_LIMIT)
def test_a_number_past_int32_means_no_limit(name):
    """Catches a cast that wraps: 2**33 new tokens were 0, 2**32 draft tokens none; no limit was meant."""
    largest = {"max_new_tokens": 100, "max_draft_len": 100, "top_k": 0, "min_new_tokens": 100}[name]
    wanted = _texts(**{name: largest})
    for huge in HUGE:
        out = _texts(**{name: huge})
        assert out.new_tokens() == wanted.new_tokens()
        assert (out.status == wanted.status).all()
        assert (out.stats.rounds == wanted.stats.rounds).all()
    unsigned = _texts(**{name: jnp.uint32(2**32 - 1)})
    traced = jax.jit(lambda value: _texts(**{name: value}).tokens)(jnp.uint32(2**32 - 1))
    assert (unsigned.tokens == wanted.tokens).all()
    assert (traced == wanted.tokens).all()


@pytest.mark.parametrize("name", IN_A_RANGE)
@pytest.mark.parametrize("huge", [2**32 + 5, 2**70, -(2**40)])
def test_a_number_that_int32_does_not_hold_is_refused(name, huge):
    """Catches a cast that wraps where no other number can be meant: seed 2**32 + 5 was seed 5."""
    value = np.full(SHAPES[name], huge) if name in SHAPES else huge
    with pytest.raises(ValueError, match=rf"{name}.*(\.\.|or more|empty|= -)"):
        _texts(**{name: value})


@pytest.mark.parametrize("huge", [2**16, 2**32, 2**70, 2.0, True])
def test_draft_lengths_have_a_range(huge):
    """Catches an OverflowError, or a loop that never ends, from a K that nobody can mean."""
    for make in (
        specjax.controllers.fixed, lambda k: specjax.controllers.confidence(0.4, k), specjax.controllers.additive,
        lambda k: specjax.profile(MODEL, TABLE, DRAFTER, TABLE, longest=k),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"in 1\.\.65535"):
            make(huge)
    assert specjax.controllers.additive(4, up=2**40, down=2**40).longest == 4
