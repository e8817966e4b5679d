"""What newcomers write, and the sentence that they read."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import specjax
from specjax import controllers, stats, testing

MODEL = testing.table_model(1, 8)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
DRAFTER = specjax.drafters.draft_model(MODEL)
PROMPTS = jnp.array([[1, 2, 3], [4, 5, 6]])
PAIR = (MODEL, TABLE, DRAFTER, TABLE)


def test_parts_are_found_without_an_import_of_their_own():
    """Catches an AttributeError after `import specjax`, and an import that starts with all of them."""
    code = (
        "import sys, specjax; before = set(sys.modules); "
        "assert 'specjax.text' not in before and 'specjax.models' not in before, 'not on demand'; "
        "names = ('text', 'models', 'adapters', 'testing', 'sharding'); "
        "assert all(getattr(specjax, name).__name__ == f'specjax.{name}' for name in names); "
        "assert set(names) <= set(dir(specjax))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'txet'"):
        specjax.txet  # noqa: B018


@pytest.mark.parametrize("call", [specjax.generate, specjax.stream])
def test_settings_of_sampling_say_where_they_belong(call):
    """Catches "got an unexpected keyword argument 'temperature'", which does not say where to put it."""
    with pytest.raises(TypeError, match=r"sampling=specjax\.Sampling\(temperature=0\.8, top_p=0\.9\)"):
        call(*PAIR, PROMPTS, temperature=0.8, top_p=0.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        call(*PAIR, PROMPTS, temprature=0.8)
    with pytest.raises(TypeError, match=r"autoregressive takes no top_k: .*Sampling\(top_k=3\)"):
        specjax.autoregressive(MODEL, TABLE, PROMPTS, top_k=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("prompts", [["def fib(n):"], ["a", "bc"], "text"])
def test_text_is_no_prompt(prompts):
    """Catches a message about dtype <U11."""
    with pytest.raises(ValueError, match=r"got text: .*text\.encode.*text\.generate_text"):
        specjax.generate(*PAIR, prompts)


def test_statistics_are_for_the_host():
    """Catches a TracerArrayConversionError."""
    for function in (
        stats.acceptance_rate, stats.token_acceptance, stats.acceptance_by_position, stats.tokens_per_round,
        stats.draft_lengths, stats.draft_utilisation,
    ):  # fmt: skip

        @jax.jit
        def run(params, function=function):
            return function(specjax.generate(MODEL, params, DRAFTER, params, PROMPTS, max_new_tokens=2).stats)

        with pytest.raises(ValueError, match=r"still traced: return out\.stats"):
            run(TABLE)


def _loss(params, share, writing=None):
    """The log-probability of what was written: by the generation itself, and scored anew."""
    writing = params if writing is None else writing
    out = specjax.generate(
        MODEL, writing, DRAFTER, writing, PROMPTS, max_new_tokens=4, sampling=specjax.Sampling(1.0),
        controller=controllers.fixed(2),
    )  # fmt: skip
    block = MODEL.init_block(params, 2, 7)
    logits = MODEL.apply(params, out.tokens, MODEL.init_cache(params, 2, 8), block).logits[:, 2:-1]
    scored = jnp.take_along_axis(jax.nn.log_softmax(logits), out.tokens[:, 3:, None], -1)
    return scored.sum() if share is None else scored.sum() + share * out.log_probs.raw.sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["as it is", "jitted"])
def test_gradients_go_around_a_generation(wrap):
    """Catches "Reverse-mode differentiation does not work for lax.while_loop", a gradient of 0 without a word, and a
    policy gradient that may not generate inside its loss."""
    gradient = jax.grad(wrap(lambda params: _loss(params, None)))(TABLE)
    assert float(jnp.abs(gradient).max()) > 0
    with pytest.raises(ValueError, match=r"no gradient flows through a generation.*model\.apply"):
        jax.grad(wrap(lambda params: _loss(params, 1.0)))(TABLE)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["as it is", "jitted"])
def test_forward_mode_is_told_the_same(wrap):
    """Catches "can't apply forward-mode differentiation (jvp) to a custom_vjp function"."""
    said = r"no gradient flows through a generation.*model\.apply.*stop_gradient\(params\)"
    for way in (jax.jacfwd, lambda f: lambda params: jax.jvp(f, (params,), (params,))):
        with pytest.raises(ValueError, match=said):
            wrap(way(lambda params: _loss(params, 1.0)))(TABLE)
    forward = wrap(lambda params: jax.jvp(lambda p: _loss(p, None, jax.lax.stop_gradient(p)), (params,), (params,)))
    gradient = jax.grad(lambda params: _loss(params, None))(TABLE)
    assert float(forward(TABLE)[1]) == pytest.approx(float((gradient * TABLE).sum()), rel=1e-4)
