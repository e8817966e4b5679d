"""Products of few rows: the forms for CPU give what a plain product gives, alone, mapped and differentiated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.models import products
from specjax.models.products import materialised, project

WEIGHTS = {  # out x in: the last is too narrow, and the one before too small, for both cores
    "wide": (512, 288),
    "tall": (130, 1024),
    "small": (48, 288),
    "narrow": (1024, 192),
}


def _arrays(rows: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(rows)
    shapes = (rows, WEIGHTS[name][1]), WEIGHTS[name]
    x, weight = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, weight


@pytest.fixture(params=[1, 4], autouse=True)
def _most_rows_in_lanes(request, monkeypatch):
    """As on either kind of machine; what was traced for the other is forgotten."""
    monkeypatch.setattr(products, "most_rows_in_lanes", lambda: request.param)
    jax.clear_caches()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 33])
def test_every_form_is_the_product(rows, name):
    """Catches rows that a form for CPU mixes up or drops (an odd one, say), and columns left out of its sum."""
    x, weight = _arrays(rows, name)
    got = jax.jit(project)(x[:, None], weight)
    np.testing.assert_allclose(got[:, 0], x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mapped", [(0, None), (0, 0), (None, 0)])
@pytest.mark.parametrize("rows", [1, 3])
def test_mapped_rows_share_one_product(rows, mapped):
    """Catches a form that under vmap reads the weights once for each row, and one that maps the wrong operand."""
    x, weight = _arrays(rows, "wide")
    pairs = zip((x, weight), mapped, strict=True)
    many = [np.stack([value, 2 * value, -value]) if axis == 0 else value for value, axis in pairs]
    mapped_project = jax.jit(jax.vmap(project, mapped))
    plain = jax.vmap(lambda x, weight: x @ weight.T, mapped)
    np.testing.assert_allclose(mapped_project(*many), plain(*many), rtol=1e-5, atol=1e-4)
    text = mapped_project.lower(*many).as_text()
    assert "dot_general" in text
    assert "complex" not in text


def test_gradients_are_those_of_the_product():
    """Catches a form that cannot be differentiated: short texts are re-scored for policy gradients."""
    x, weight = _arrays(3, "wide")

    def loss(product):
        return jax.grad(lambda x, weight: jnp.sum(jnp.sin(product(x, weight))), argnums=(0, 1))

    for got, wanted in zip(loss(project)(x, weight), loss(lambda x, weight: x @ weight.T)(x, weight), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


def test_what_every_layer_reads_is_computed_once():
    """Catches angles whose cosines every layer computes again for each head, and a product that is not exact."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 32)), jnp.float32)

    def reads_twice(x, around):
        angles = around(jnp.cos(x))
        return jnp.concatenate([angles, -angles], -1), jnp.sum(jnp.tile(angles, (3, 1, 1)) * x, 1)

    cosines = {
        around: jax.jit(reads_twice, static_argnums=1).lower(x, around).compile().as_text().count(" cosine(")
        for around in (materialised, lambda x: x)
    }
    assert list(cosines.values()) == [1, 2], "the second is the control: if it is 1, XLA no longer needs our help"
    np.testing.assert_array_equal(jax.jit(materialised)(jnp.cos(x)), jnp.cos(x))
