"""Bytes and operations, against numbers counted by hand; the table of machines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import tiny
import toys
from jax import lax

from specjax import models
from specjax.profiling import machine, roofline
from specjax.profiling.machine import Machine
from specjax.profiling.roofline import Work
from specjax.types import Model, Output

BATCH, TOKENS, LIVE = 2, 3, 100
ROWS = BATCH * TOKENS

# tiny's Llama: width 16, inner 24, 4 query and 2 key/value heads of 4, 2 layers, 13 ids, an output layer of its own.
LLAMA_PRODUCTS = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
LLAMA_VECTORS = 2 * 2 * 16 + 16
LLAMA_HEAD = LLAMA_TABLE = 13 * 16
LLAMA_PER_TOKEN = 2 * 2 * 2 * 4  # layers, keys and values, heads, head size
# tiny's GPT-2: width 16, inner 64, 2 heads of 8, 2 layers, 13 ids, tied; biases everywhere; 64 positions.
GPT2_PRODUCTS = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
GPT2_VECTORS = 2 * (48 + 16 + 64 + 16 + 4 * 16) + 2 * 16
GPT2_HEAD = 13 * 16
GPT2_PER_TOKEN = 2 * 2 * 16


def _count(family, dtype=jnp.float32, **options):
    model, params = tiny.model(family)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return roofline.count(model, params, **{"batch": BATCH, "tokens": TOKENS, "live": LIVE, **options})


def _attention(layers, query_width):
    """Scores and their mixing: every new token with every live one, and with the block, masked places included."""
    return 2 * 2 * layers * query_width * ROWS * (LIVE + TOKENS)


@pytest.mark.parametrize("size", [4, 2])
def test_llama_by_hand(size):
    """Catches an untied embedding counted as read whole, a cache or a head counted for one row only."""
    found = _count("llama", {4: jnp.float32, 2: jnp.bfloat16}[size])
    looked_up = ROWS * 16
    assert looked_up < LLAMA_TABLE
    weights = LLAMA_PRODUCTS + LLAMA_VECTORS + LLAMA_HEAD + looked_up
    cached = BATCH * (LIVE + TOKENS) * LLAMA_PER_TOKEN
    assert found.bytes == size * (weights + cached) + 4 * BATCH + 4 * ROWS * 13  # lengths; logits in float32
    assert found.flops == 2 * ROWS * (LLAMA_PRODUCTS + LLAMA_HEAD) + _attention(2, 16)


def test_gpt2_by_hand():
    """Catches a tied table counted twice, and positions that are not looked up counted as read."""
    found = _count("gpt2")
    weights = GPT2_PRODUCTS + GPT2_VECTORS + GPT2_HEAD + ROWS * 16
    cached = BATCH * (LIVE + TOKENS) * GPT2_PER_TOKEN
    assert found.bytes == 4 * (weights + cached) + 4 * BATCH + 4 * ROWS * 13
    assert found.flops == 2 * ROWS * (GPT2_PRODUCTS + GPT2_HEAD) + _attention(2, 16)


def test_logits_at_one_place():
    """Catches a first draft step that pays for logits nobody reads."""
    every, one = _count("llama"), _count("llama", logits=1)
    assert every.bytes - one.bytes == 4 * BATCH * (TOKENS - 1) * 13
    assert every.flops - one.flops == 2 * BATCH * (TOKENS - 1) * LLAMA_HEAD


def test_a_small_table_is_read_once_at_most():
    """Catches more bytes looked up than a table has."""
    few, many = (_count("llama", batch=rows, live=0).bytes for rows in (8, 9))
    per_row = 4 * TOKENS * (LLAMA_PER_TOKEN + 13) + 4
    assert many - few == per_row


def test_a_recurrent_state_does_not_grow():
    """Catches a state of fixed size counted once for each token."""
    params = tuple(jnp.ones((8, n)) for n in (8, 5))
    params = (params[0], jnp.ones((5, 8)), params[1])
    near, far = (roofline.count(toys.recurrent(), params, batch=1, tokens=1, live=live) for live in (10, 1000))
    assert near == far
    # Mixing and output weights, one looked-up row, the state, the logits.
    assert near == Work(4 * (64 + 40 + 8 + 8 + 5), 2 * (64 + 40))


def _stacked(dequantise):
    """Layers scanned over, their weights stacked; whole numbers with a scale, where asked."""

    def apply(params, tokens, cache, block, *, depths=None, visible=None, logits_at=None, hidden_layers=()):
        del depths, visible, logits_at, hidden_layers
        table, weights, scales = params

        def layer(x, weight):
            values = weight[0].astype(jnp.float32) * weight[1] if dequantise else weight[0]
            return x @ values, None

        x, _ = lax.scan(layer, table[tokens], (weights, scales))
        return Output(x, (), block)

    return Model(apply, lambda *_: (), lambda *_: (), lambda cache, *_: cache, 6)


@pytest.mark.parametrize("dequantise", [False, True])
def test_scanned_and_quantised_layers(dequantise):
    """Catches weights read once a layer, products of one layer only, and whole numbers that count as wide ones or as
    attention."""
    weights = jnp.ones((5, 6, 6), jnp.int8 if dequantise else jnp.float32)
    params = (jnp.ones((9, 6)), weights, jnp.ones((5, 1, 1)))
    found = roofline.count(_stacked(dequantise), params, batch=1, tokens=2, live=7)
    read = weights.nbytes + (5 * 4 if dequantise else 0) + 2 * 6 * 4
    assert found == Work(read + 2 * 6 * 4, 2 * 2 * 5 * 36)


def test_a_round_is_its_passes():
    """Catches a draft step too many, and a verification that forgets the last emitted token."""
    model, params = tiny.model("llama")
    draft, draft_params = tiny.model("gpt2")
    passes = roofline.speculation(model, params, draft, draft_params, batch=2, live=50, draft_len=4)
    first, *more, verify = passes
    assert first == roofline.count(draft, draft_params, batch=2, tokens=2, live=50, logits=1)
    assert more == [roofline.count(draft, draft_params, batch=2, tokens=1, live=51)] * 3
    assert verify == roofline.count(model, params, batch=2, tokens=5, live=50)
    assert roofline.step(model, params, batch=2, live=50) == [roofline.count(model, params, batch=2, tokens=1, live=50)]
    slow = Machine("slow", bandwidth=10.0, flops=1e30, origin="made up")
    assert roofline.seconds(passes, slow) == pytest.approx(roofline.total(passes).bytes / 10)


def test_nothing_runs():
    """Catches a count that needs the weights: those of 70B parameters fit nowhere."""
    model, params = tiny.model("llama")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert roofline.count(model, abstract, batch=1, tokens=1, live=9) == roofline.count(
        model, params, batch=1, tokens=1, live=9
    )


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("TPU v5 lite", 819), ("TPU v5", 2765), ("TPU v5p", 2765), ("TPU v6 lite", 1638), ("TPU v4", 1228),
        ("NVIDIA L4", 300), ("NVIDIA L40S", 864), ("NVIDIA H100 80GB HBM3", 3350), ("NVIDIA H100 PCIe", 2000),
        ("Tesla V100-SXM2-16GB", 900),
    ],
)  # fmt: skip
def test_known_machines(kind, bandwidth):
    """Catches a device taken for another whose name begins alike."""
    found = machine.known(kind, jnp.bfloat16)
    assert found is not None
    assert found.bandwidth == bandwidth * 1e9
    narrow, wide = (machine.known(kind, dtype) for dtype in (jnp.float16, jnp.float32))
    assert narrow is not None
    assert wide is not None
    assert narrow.flops > 3 * wide.flops


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v9"])
def test_unknown_machines(kind):
    """Catches a guess: those are measured."""
    assert machine.known(kind, jnp.float32) is None


def test_a_measured_machine(monkeypatch):
    """Catches a measurement that fails in a dtype, or that measures nothing."""
    monkeypatch.setattr(machine, "_READ_BYTES", 2**20)
    monkeypatch.setattr(machine, "_PRODUCT", 64)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = machine.this_machine(dtype)
        assert found.origin == "measured"
        assert found.bandwidth > 0
        assert found.flops > 0


def test_a_form_for_one_platform_is_not_counted():
    """Catches the operations of a CPU's own form of a product, in which none is called a product, taken for all."""
    config = tiny.config("llama", vocab_size=512, hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    loaded = models.random(config, jax.random.key(0))
    found = roofline.count(loaded.model, loaded.params, batch=1, tokens=1, live=0)
    products = 2 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 512) + 512 * 256
    assert products <= found.flops / 2 < 1.01 * products
