"""The parts of benchmarks/ that can be wrong without anybody noticing: what peers are given, what is counted."""

from __future__ import annotations

import functools
import json

import gpu
import jax
import jax.numpy as jnp
import llama_cpp_child
import numpy as np
import pytest
import synthetic
import tiny
import to_gguf
from flax import nnx

import specjax
from specjax import models
from specjax.models import rope
from specjax.profiling import forward


def test_tensors_are_read_as_they_were_stored():
    """Catches bfloat16 bits in the wrong half, offsets off by a header, names that GGUF does not know."""
    folder = models.PRETRAINED / "draft"
    loaded = models.load(folder, dtype=jnp.float32)
    wanted = {".".join(map(str, path[:-1])): leaf[...] for path, leaf in nnx.to_flat_state(loaded.params)}
    found = dict(to_gguf._tensors(folder / "model.safetensors"))
    assert len(found) == len(wanted)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, wanted[name.removesuffix(".weight")])
    names = {to_gguf._name(name) for name in found}
    assert {"token_embd.weight", "output_norm.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"} <= names


def test_interleaved_rows_rotate_alike():
    """Catches a permutation the wrong way round: llama.cpp turns neighbours, Hugging Face halves, by the same angle."""
    heads, head_dim, width = 3, 8, 5
    weight = np.random.default_rng(0).normal(size=(heads * head_dim, width)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(width,)).astype(np.float32)
    cos, sin = rope.angles(rope.from_config({}, head_dim), jnp.array([[7]]))
    halves = rope.rotate((weight @ x).reshape(1, heads, 1, head_dim), cos, sin)[0, :, 0]
    first, second = (to_gguf._interleave(weight, heads) @ x).reshape(heads, head_dim // 2, 2).transpose(2, 0, 1)
    cos, sin = np.asarray(cos)[0, :, 0], np.asarray(sin)[0, :, 0]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    np.testing.assert_allclose(turned, halves, rtol=1e-5, atol=1e-6)


class _Fake:
    """A Context whose next token is a sum of those before: wrong as soon as the cache holds a wrong one."""

    def __init__(self, wrong_every: int = 0):
        self.text: list[int] = []
        self.wrong_every = wrong_every

    @property
    def length(self) -> int:
        return len(self.text)

    def apply(self, tokens, *, logits=None):
        out = []
        for token in tokens:
            self.text.append(token)
            is_wrong = self.wrong_every and len(self.text) % self.wrong_every == 0
            out.append((sum(self.text) * 7 + len(self.text)) % 101 + bool(is_wrong))
        return out if logits is None else out[-logits:]

    def keep(self, length):
        del self.text[length:]


@pytest.mark.parametrize("wrong_every", [0, 1, 2, 5])
@pytest.mark.parametrize("draft_len", [1, 3, 6])
def test_the_peers_speculation_is_its_plain_decoding(wrong_every, draft_len):
    """Catches a loop of ours that makes a peer look slow: caches out of step, tokens drafted twice."""
    wanted = llama_cpp_child.plain(_Fake(), [3, 1, 4], 30)  # type: ignore[arg-type]
    target, draft = _Fake(), _Fake(wrong_every)
    found = llama_cpp_child.speculative(target, draft, [3, 1, 4], 30, draft_len)  # type: ignore[arg-type]
    assert found["tokens"] == wanted["tokens"]
    if wrong_every == 0:
        assert found["accepted"] == found["drafted"]
        assert found["passes"] == -(-29 // (draft_len + 1))
    assert found["accepted"] + found["passes"] == 29


def test_a_pass_is_timed():
    """Catches a loop that does not compile, or runs no pass."""
    seen = []
    model, params = tiny.model("llama")

    def apply(params, tokens, *args, **options):
        seen.append(tokens.shape)
        return model.apply(params, tokens, *args, **options)

    forward.time_pass(model._replace(apply=apply), params, tokens=3, live=5, batch=2, passes=2, repeats=1)
    assert (2, 3) in seen


def test_the_timed_loop_depends_on_every_pass():
    """Catches a pass that XLA may leave out: its result must reach the next one."""
    model, params = tiny.model("table")
    cache = forward._fill(model, 8, params, jnp.array([[1, 2]]))
    loop = functools.partial(forward._loop, model, params, cache, jnp.zeros((1, 1), jnp.int32))
    token, wanted = jnp.zeros((1, 1), jnp.int32), []
    for _ in range(4):
        out = model.apply(params, token, cache, model.init_block(params, 1, 1))
        token = jnp.argmax(out.logits[..., : model.vocab_size], -1).astype(jnp.int32)
        wanted.append(int(token[0, 0]))
    assert [int(loop(jnp.int32(count))[0, 0]) for count in (1, 2, 3, 4)] == wanted


def test_a_synthetic_pair():
    """Catches a drafter whose acceptance is not the one set, near-ties in bfloat16, and a draft model that XLA leaves
    out because nobody reads what it says. 64 rows, 40 tokens, K = 4, alpha 0.7: of some 1,500 tested tokens 0.7 are
    accepted, to 0.06, which is five standard deviations (false alarms: one in a million)."""
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    target, cost = (synthetic.successor(config, jax.random.key(seed), jnp.bfloat16) for seed in (0, 1))
    prompts = jnp.arange(64, dtype=jnp.int32)[:, None]
    options = {"max_new_tokens": 40, "controller": specjax.controllers.fixed(4)}
    flops = []
    for model, params in ((None, ()), (cost.model, cost.params)):
        part = synthetic.drafter(64, 0.7, model)

        def run(params, part=part):
            return specjax.generate(target.model, target.params, part, params, prompts, **options)

        program = jax.jit(run).lower(params).compile()
        flops.append(program.cost_analysis()["flops"])
        out = program(params)
        assert out.new_tokens() == [[(first + step) % 64 for step in range(1, 41)] for first in range(64)]
        assert specjax.stats.token_acceptance(out.stats) == pytest.approx(0.7, abs=0.06)
    # Two of its steps are in the program, once each; its output layer is read for the drafts alone.
    head, layers = 2 * 64 * 64 * 32, 2 * 64 * 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert flops[1] - flops[0] > 2 * (head + layers)


def test_the_gpu_benchmark_rehearses(tmp_path, monkeypatch):
    """Catches a script that fails when at last there is a GPU."""
    monkeypatch.setattr(gpu, "this_machine", lambda dtype: gpu.Machine("made up", 1e9, 1e12, "made up"))
    asked = []

    def measured(pair, setting, busy):
        asked.append(setting)
        line = gpu.bench.Line(
            None,
            None,
            1,
            1.0,
            1.0,
            None,
            1.0,
            1.0,
            [1.0],
            False,
            1.0,
            1.0,
            gpu.roofline.Work(1.0, 1.0),
            1.0,
            [],
            None,
            [],
            None,
            None,
        )
        return gpu.bench.Speed([line], setting, gpu.this_machine("float32"), 1.0, "float32")

    monkeypatch.setattr(gpu.bench, "measure", measured)
    gpu.main(size=["1b"], draft_len=3, rehearse=True, json_file=tmp_path / "out.json")
    said = json.loads((tmp_path / "out.json").read_text())
    part = said["parts"]["1b"]
    assert part["pass_seconds"].keys() == {"1", "4"}
    assert all(found["same_tokens"] for found in part["rounds"].values())
    assert part["transformers"].keys() & {"skipped", "compiled, static cache"}
    assert asked[0].draft_lens == (3,)
    assert said["shipped pair"]["lines"][0]["speedup"] == 1


def test_the_sizes_are_llamas():
    """Catches shapes that are not those of Llama 3.2 1B (1.24B with tied embeddings) and Llama 3.1 8B (8.03B)."""
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(models.build({**gpu.LLAMA, **shape}).abstract))
             for name, shape in gpu.SHAPES.items()}  # fmt: skip
    assert round(sizes["8b"] / 1e9, 2) == 8.03
    assert round((sizes["1b"] - 128256 * 2048) / 1e9, 2) == 1.24
