"""int8 matrices: what they stand for, and that everything else is as before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import specjax
from specjax import models, sharding, testing
from specjax.models import family, int8

PROMPTS = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]])
LENGTHS = jnp.array([4, 2])


def _pair(name, seed=0):
    """A tiny model, and the same in int8."""
    loaded = models.random(tiny.config(name, vocab_size=16), jax.random.key(seed))
    scaled = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, loaded.params)
    loaded = loaded._replace(params=scaled)
    return loaded, models.quantize(loaded)


def _written_out(plain, quantised):
    """The int8 model's matrices as floats, in the plain model's tree."""
    named = {family.tensor_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(quantised.params)}

    def back(path, leaf):
        name = family.tensor_name(path)
        scale = named.get(name.replace("weight", "scale"))
        return leaf if scale is None else named[name].astype(leaf.dtype) * scale

    return jax.tree_util.tree_map_with_path(back, plain.params)


@pytest.mark.parametrize("axis", [0, 1])
def test_every_entry_is_the_nearest_multiple(axis):
    """Catches a scale along the wrong axis, values that wrap around, and a row of zeros that becomes NaN."""
    weight = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32) * np.logspace(-3, 3, 9)
    weight[2] = 0 if axis else weight[2]
    rounded = int8.round_matrix(jnp.asarray(weight, jnp.float32), axis)
    assert rounded.weight.dtype == jnp.int8
    scale = np.abs(weight).max(axis, keepdims=True) / 127
    error = np.abs(np.asarray(rounded.weight, np.float64) * np.asarray(rounded.scale) - weight)
    assert (error <= scale * 0.5001 + 1e-12).all()
    half = int8.round_matrix(jnp.asarray(weight, jnp.bfloat16), axis)
    assert half.scale.dtype == jnp.bfloat16
    assert int(jnp.abs(half.weight).max()) == 127


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_computes_what_its_matrices_say(name):
    """Catches a scale applied to the wrong side, twice or not at all: logits equal those of the plain model whose
    matrices are the int8 ones written out. Float32, 1e-4."""
    plain, quantised = _pair(name)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(quantised.params)}
    assert dtypes == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}
    params = _written_out(plain, quantised)
    cache, block = plain.model.init_cache(params, 2, 8), plain.model.init_block(params, 2, 4)
    wanted = plain.model.apply(params, PROMPTS, cache, block).logits
    cache = quantised.model.init_cache(quantised.params, 2, 8)
    assert cache.keys[0].dtype == jnp.float32
    ours = quantised.model.apply(quantised.params, PROMPTS, cache, block).logits
    np.testing.assert_allclose(ours, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_speculation_is_exact_for_it(name):
    """Catches a quantised target that verifies other than it decodes, and a quantised draft that changes its tokens."""
    _, quantised = _pair(name)
    _, small = _pair("llama", 1)
    assert len(testing.check_model(quantised.model, quantised.params)) == 7
    wanted = specjax.autoregressive(quantised.model, quantised.params, PROMPTS, LENGTHS, max_new_tokens=12)
    out = specjax.generate(
        quantised.model, quantised.params, specjax.drafters.draft_model(small.model), small.params, PROMPTS, LENGTHS,
        max_new_tokens=12, controller=specjax.controllers.fixed(3),
    )  # fmt: skip
    assert out.new_tokens() == wanted.new_tokens()


def test_on_a_mesh():
    """Catches scales that lie otherwise than their rows."""
    plain, quantised = _pair("llama")
    layout = sharding.layout(sharding.make_mesh(model=2))
    built = models.build(plain.config, layout=layout)
    there = models.Loaded(built.model, jax.device_put(plain.params, models.shardings(built)), plain.config, None)
    cut = models.quantize(there)
    assert cut.params["lm_head"]["scale"][...].sharding.spec == jax.sharding.PartitionSpec(("model",))
    ours = specjax.autoregressive(cut.model, cut.params, PROMPTS, LENGTHS, max_new_tokens=12)
    wanted = specjax.autoregressive(quantised.model, quantised.params, PROMPTS, LENGTHS, max_new_tokens=12)
    assert ours.new_tokens() == wanted.new_tokens()


def test_cannot_be_saved(tmp_path):
    """Catches a folder that transformers would read as something else."""
    _, quantised = _pair("llama")
    with pytest.raises(ValueError, match="a quantised model is no Hugging Face checkpoint"):
        models.save(quantised, tmp_path / "out")
    assert not (tmp_path / "out").exists()
