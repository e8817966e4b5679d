"""Every supported configuration against transformers on PyTorch, float32, within 1e-4: all at once and block by block.

Each configuration is written by transformers' `save_pretrained` with every parameter random, and read by
`models.load`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import transformers
import xla_options

from specjax import models
from specjax.decode.prefill import prefill

TOLERANCE = 1e-4


class Variant(NamedTuple):
    """One configuration."""

    name: str
    model_type: str
    options: dict[str, Any]
    without: dict[str, Any]  # options without the feature in question: the logits must differ
    legacy: bool = False  # config.json as transformers 4 wrote it


LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2}
PLAIN500 = {"rope_type": "default", "rope_theta": 500.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# The legacy variants describe the same models, so that they also share their compiled programs.
QWEN2_WINDOW = {
    **LLAMA,
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
}

VARIANTS = (
    Variant("llama2", "llama", {**LLAMA, "num_key_value_heads": 4, "rms_norm_eps": 1e-2}, {"rms_norm_eps": 1e-6}),
    Variant(
        "llama-biases", "llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"attention_bias": False},
    ),
    Variant(
        "llama-attention-bias", "llama", {**LLAMA, "attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "silu"},
    ),
    Variant("llama3", "llama", {**LLAMA, "rope_parameters": LLAMA3}, {"rope_parameters": PLAIN}),
    Variant("llama3-legacy", "llama", {**LLAMA, "rope_parameters": LLAMA3}, {"rope_parameters": PLAIN}, legacy=True),
    Variant("linear", "llama", {**LLAMA, "rope_parameters": LINEAR}, {"rope_parameters": PLAIN}),
    Variant("linear-legacy", "llama", {**LLAMA, "rope_parameters": LINEAR}, {"rope_parameters": PLAIN}, legacy=True),
    Variant("yarn", "llama", {**LLAMA, "rope_parameters": YARN}, {"rope_parameters": PLAIN500}),
    Variant("yarn-legacy", "llama", {**LLAMA, "rope_parameters": YARN}, {"rope_parameters": PLAIN500}, legacy=True),
    Variant("dynamic-short", "llama", {**LLAMA, "rope_parameters": DYNAMIC}, {"rope_parameters": LINEAR}),
    Variant("mistral-window", "mistral", {**LLAMA, "sliding_window": 5}, {"sliding_window": None}),
    Variant("mistral-full", "mistral", {**LLAMA, "sliding_window": None, "head_dim": 16}, {"sliding_window": 5}),
    Variant("qwen2", "qwen2", LLAMA, {"rope_parameters": PLAIN500}),
    Variant("qwen2-window", "qwen2", QWEN2_WINDOW, {"max_window_layers": 2}),
    Variant("qwen2-window-legacy", "qwen2", QWEN2_WINDOW, {"use_sliding_window": False}, legacy=True),
    Variant(
        "qwen2-window-unused", "qwen2", {**LLAMA, "sliding_window": 4, "max_window_layers": 0},
        {"use_sliding_window": True},
    ),
    Variant("qwen3", "qwen3", {**LLAMA, "head_dim": 12}, {"rms_norm_eps": 1e-2}),
    Variant(
        "qwen3-window-bias", "qwen3",
        {**LLAMA, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    Variant(
        "smollm", "llama",
        {**LLAMA, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        {"rope_parameters": PLAIN500},
    ),
    Variant(
        "mqa-legacy", "llama", {**LLAMA, "num_key_value_heads": 1, "rope_parameters": PLAIN500},
        {"rope_parameters": PLAIN}, legacy=True,
    ),
    Variant("gpt2", "gpt2", GPT2, {"activation_function": "gelu"}),
    Variant(
        "gpt2-by-layer", "gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": False},
    ),
    Variant(
        "gpt2-untied", "gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 24, "layer_norm_epsilon": 1e-2},
        {"layer_norm_epsilon": 1e-5},
    ),
)  # fmt: skip


# Lopsided on purpose: nothing kept, everything kept. Blocks of other widths are in test_models_blocks.py: every width
# is one more program to compile for each configuration.
PREFILL = (9, 4, 7)
WIDTH = 4
KEPT = ((2, 4, 0), (1, 0, 1), (4, 3, 1), (3, 2, 2))  # of each block, by each row
LENGTHS = tuple(np.sum([PREFILL, *KEPT], 0).tolist())
SLOTS = 64


class Case(NamedTuple):
    """A configuration loaded by both."""

    variant: Variant
    reference: Any
    loaded: models.Loaded
    layers: int
    tokens: np.ndarray  # [B, T] int32, the padding random too
    wanted: tuple[np.ndarray, ...]  # per row [length, V]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def case(request, make_reference, read_reference, reference_logits, tmp_path_factory) -> Case:
    variant = request.param
    reference = make_reference(variant.model_type, **variant.options)
    folder = tmp_path_factory.mktemp("parity") / variant.name
    reference.save_pretrained(folder)
    if variant.legacy:
        _to_legacy(folder)
        reference = read_reference(folder)
    tokens = np.random.default_rng(1).integers(0, 61, (3, max(LENGTHS)), np.int32)
    wanted = tuple(reference_logits(reference, row[:length]) for row, length in zip(tokens, LENGTHS, strict=True))
    return Case(variant, reference, models.load(folder), reference.config.num_hidden_layers, tokens, wanted)


def test_whole_text_matches_transformers(case, torch):
    """Catches any wrong weight, transposition, epsilon, rope, bias, mask or window; padding that leaks into rows; and
    hidden layers numbered off by one (0 is the embedding, the last one comes before the final norm)."""
    model, params = case.loaded.model, case.loaded.params
    asked = (case.layers, 0, 1)  # in the order asked, not in the model's
    cache = model.init_cache(params, 3, SLOTS)
    logits, hidden, cache = _read(model, params, case.tokens, cache, np.array(LENGTHS), asked)
    assert logits.dtype == np.float32
    assert cache.lengths.tolist() == list(LENGTHS)
    for row, wanted in enumerate(case.wanted):
        np.testing.assert_allclose(logits[row, : len(wanted)], wanted, rtol=0, atol=TOLERANCE)
    for got, wanted in zip(hidden, _reference_hidden(torch, case, asked), strict=True):
        np.testing.assert_allclose(got[0], wanted, rtol=0, atol=TOLERANCE)


def test_blocks_match_transformers(case):
    """Catches a position counted from the wrong place, a cache slot off by one, traces of rejected tokens, a window
    that forgets the cache, and rows that move together: each keeps a different part of every block."""
    model, params = case.loaded.model, case.loaded.params
    rng = np.random.default_rng(2)
    lengths = np.array(PREFILL)
    prompts = np.where(np.arange(max(PREFILL)) < lengths[:, None], case.tokens[:, : max(PREFILL)], 7)
    logits, cache = _prefill(model, params, prompts, lengths, model.init_cache(params, 3, SLOTS))
    for row, length in enumerate(PREFILL):
        np.testing.assert_allclose(logits[row], case.wanted[row][length - 1], rtol=0, atol=TOLERANCE)
    for keep in KEPT:
        block = rng.integers(0, 61, (3, WIDTH), np.int32)  # rejected tokens are arbitrary ids
        for row, count in enumerate(keep):
            block[row, :count] = case.tokens[row, lengths[row] : lengths[row] + count]
        logits, _, cache = _read(model, params, block, cache, np.array(keep))
        for row, count in enumerate(keep):
            wanted = case.wanted[row][lengths[row] : lengths[row] + count]
            np.testing.assert_allclose(logits[row, :count], wanted, rtol=0, atol=TOLERANCE)
        lengths = lengths + keep
    assert cache.lengths.tolist() == list(LENGTHS)


def test_feature_shows_in_the_logits(case, reference_logits):
    """Catches a comparison that proves nothing: without the feature transformers itself must say something else."""
    options = {**case.variant.options, **case.variant.without}
    config = transformers.AutoConfig.for_model(case.variant.model_type, **options)
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(case.reference.state_dict(), strict=False)
    difference = np.abs(reference_logits(other, case.tokens[0, : LENGTHS[0]]) - case.wanted[0]).max()
    assert difference > 10 * TOLERANCE


def _reference_hidden(torch: ModuleType, case: Case, layers: tuple[int, ...]) -> list[np.ndarray]:
    """transformers' hidden states of row 0. Its own list ends with the normed state: the last layer is overheard."""
    trunk = case.reference.base_model
    last = []
    hook = (trunk.h if case.variant.model_type == "gpt2" else trunk.layers)[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        ids = torch.tensor(case.tokens[:1]).long()
        states = case.reference(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    states = (*states[:-1], last[0])
    return [states[layer][0].numpy() for layer in layers]


def _to_legacy(folder: Path) -> None:
    """Rewrites config.json as transformers 4 did: rope_theta and rope_scaling at the top level, torch_dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    # Before 4.43 the field was called "type"; llama3 came with the new name.
    config["rope_scaling"] = (
        None if kind == "default" else {"rope_type" if kind == "llama3" else "type": kind} | scaling
    )
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


# Compiling is most of the time here, and the programs are run once: so compile them badly.
_jit = functools.partial(jax.jit, compiler_options=xla_options.OPTIONS)


def _read(model, params, tokens, cache, keep, hidden_layers=()):
    """Reads one block and commits `keep` of it; logits and hidden states come back to the host."""
    logits, hidden, cache = _compiled_read(model, hidden_layers, params, tokens, cache, keep)
    return np.asarray(logits), [np.asarray(state) for state in hidden], cache


@functools.partial(_jit, static_argnums=(0, 1))
def _compiled_read(model, hidden_layers, params, tokens, cache, keep):
    block = model.init_block(params, *tokens.shape)
    out = model.apply(params, tokens, cache, block, hidden_layers=hidden_layers)
    return out.logits, out.hidden, model.commit(cache, out.block, keep, None)


def _prefill(model, params, prompts, lengths, cache):
    logits, cache = _compiled_prefill(model, params, prompts, lengths, cache)
    return np.asarray(logits), cache


@functools.partial(_jit, static_argnums=0)
def _compiled_prefill(model, params, prompts, lengths, cache):
    read = prefill(model, params, prompts, lengths, cache)
    return read.logits, read.cache
