"""On a mesh of 8 simulated devices: the same tokens as on one, and nothing gathered that is cut."""

from __future__ import annotations

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec
from made_up import profile

import specjax
from specjax import Sampling, controllers, drafters, models, sharding, testing, verify
from specjax.aot import hlo
from specjax.testing import constant_drafter, time_varying_drafter
from specjax.types import Verdict, Verifier

VOCAB = 16
PROMPTS = jnp.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0], [9, 3, 1, 0]])
LENGTHS = jnp.array([4, 1, 2, 3])
LIMITS = jnp.array([14, 21, 5, 9])
SHAPES = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, "intermediate_size": 48},
    "gpt2": {"n_head": 4},
}
RULES = [
    verify.rejection(), verify.block(), verify.coupled(), verify.greedy(), verify.typical_lossy(), verify.top_k_lossy()
]  # fmt: skip
MESHES = [
    {"data": 2, "model": 4},  # both
    {"model": 4, "sub": 2},  # fewer key/value heads than devices
    {"data": 4, "model": 2},
]


def _layout(**axes):
    return sharding.layout(sharding.make_mesh(**axes))


def _model(family, layout, seed=0):
    """The same parameters, whatever the layout."""
    model, params = tiny.model(family, seed, VOCAB, **SHAPES[family])
    if layout is None:
        return model, params
    config = tiny.config(family, vocab_size=VOCAB, **SHAPES[family])
    built = models.build(config, layout=layout)
    return built.model, jax.device_put(params, models.shardings(built))


def _every_rule(repeats):
    """Row b is judged by rule b // repeats: all verifiers in one program. The coupled one shares its draft noise."""

    def run(context, draft, target):
        verdicts = [rule.verify(context, draft, target) for rule in RULES]
        which = jnp.repeat(jnp.arange(len(RULES)), repeats)
        return Verdict(*(
            jnp.stack([getattr(verdict, name) for verdict in verdicts])[which, jnp.arange(len(which))]
            for name in ("num_accepted", "next_token")
        ))  # fmt: skip

    return Verifier(run)


def _run(family, layout, draft_layout, drafter=None, controller=controllers.fixed(3), **options):
    model, params = _model(family, layout)
    draft, draft_params = _model("llama", draft_layout, seed=1)
    part, part_params = drafter or (drafters.draft_model(draft), draft_params)
    rules = len(RULES)
    # Rows of the first four rules are sampled, those of the others (greedy only, or lossy) greedy.
    temperature = jnp.repeat(jnp.array([0.8, 1.0, 0.9, 0.0, 0.0, 0.7]), len(LIMITS))
    return specjax.generate(
        model, params, part, part_params, jnp.tile(PROMPTS, (rules, 1)), jnp.tile(LENGTHS, rules),
        max_new_tokens=jnp.tile(LIMITS, rules), capacity=30, sampling=Sampling(temperature, top_p=0.9),
        verifier=_every_rule(len(LIMITS)), controller=controller, stop_tokens=[3], **options,
    )  # fmt: skip


@functools.cache
def _alone(family):
    return _run(family, None, None)


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_tokens_as_on_one_device(family, axes):
    """Catches a head beside another's keys, rows that travel, a vocabulary cut that draws other tokens. Every
    verifier, ragged rows, float32; tokens, statuses and counts."""
    layout = _layout(**axes)
    out, wanted = _run(family, layout, layout), _alone(family)
    assert out.new_tokens() == wanted.new_tokens()
    assert out.status.tolist() == wanted.status.tolist()
    np.testing.assert_array_equal(out.stats.accepted, wanted.stats.accepted)
    np.testing.assert_allclose(out.log_probs.raw, wanted.log_probs.raw, atol=1e-4)


def test_a_draft_model_kept_whole_and_seldom_tests():
    """Catches a replicated drafter that drafts otherwise, and rounds after the end that change a row."""
    layout = _layout(data=2, model=4)
    whole = sharding.layout(layout.mesh, width=())
    out = _run("llama", layout, whole, rounds_per_test=4)
    assert out.new_tokens() == _alone("llama").new_tokens()
    np.testing.assert_array_equal(out.stats.rounds, _alone("llama").stats.rounds)


def test_draft_lengths_that_vary():
    """Catches a choice among widths that a mesh takes otherwise, and rounds without a draft."""
    layout = _layout(data=2, model=4)
    adaptive = controllers.throughput(profile((1.0, 1.6, 1.9, 2.1), batch=24))
    wanted = _run("llama", None, None, controller=adaptive)
    out = _run("llama", layout, layout, controller=adaptive)
    assert out.new_tokens() == wanted.new_tokens()
    np.testing.assert_array_equal(out.stats.by_longest, wanted.stats.by_longest)
    assert (np.asarray(out.stats.by_longest).sum(0) > 0).sum() > 1


@pytest.mark.parametrize("kind", ["one-hot", "time-varying"])
def test_drafters_without_a_model(kind):
    """Catches draft distributions that lie otherwise than the target's."""
    tables = jnp.stack([testing.random_table(jax.random.key(seed), order=2, vocab_size=VOCAB) for seed in range(3)])
    drafter = (constant_drafter(1), ()) if kind == "one-hot" else (time_varying_drafter(VOCAB), tables)
    wanted = _run("llama", None, None, drafter).new_tokens()
    layout = _layout(data=2, model=4)
    assert _run("llama", layout, layout, drafter).new_tokens() == wanted


def test_plain_decoding_and_streams():
    """Catches what only `generate` takes care of."""
    layout = _layout(data=2, model=4)
    options = {"max_new_tokens": LIMITS, "sampling": Sampling(0.8), "capacity": 30}
    (model, params), (ours, our_params) = _model("llama", None), _model("llama", layout)
    wanted = specjax.autoregressive(model, params, PROMPTS, LENGTHS, **options).new_tokens()
    assert specjax.autoregressive(ours, our_params, PROMPTS, LENGTHS, **options).new_tokens() == wanted
    often = specjax.autoregressive(ours, our_params, PROMPTS, LENGTHS, rounds_per_test=5, **options)
    assert often.new_tokens() == wanted
    draft, draft_params = _model("llama", layout, seed=1)
    chunks = specjax.stream(
        ours, our_params, drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS, verifier=verify.coupled(),
        controller=controllers.fixed(3), rounds_per_dispatch=3, **options,
    )  # fmt: skip
    texts = [[] for _ in LIMITS]
    for chunk in chunks:
        for text, tokens in zip(texts, chunk.tokens, strict=True):
            text += tokens
    assert texts == wanted


@functools.cache
@mock.patch.object(models.products, "_FEW_ROWS", 0)  # the CPU's own form of products pads rows and sends them around
def _programs():
    """The compiled loops on a mesh: a fixed draft length, plain decoding, a draft length that varies. Their products
    have the form for TPUs and GPUs."""
    layout = _layout(data=2, model=4)
    (model, params), (draft, draft_params) = _model("llama", layout), _model("llama", layout, seed=1)
    given = (model, params, drafters.draft_model(draft), draft_params, PROMPTS, LENGTHS, LIMITS)
    options = {"sampling": Sampling(0.8, top_p=0.9), "stop_tokens": [3], "capacity": 30}
    adaptive = controllers.throughput(profile(batch=len(LIMITS), buckets=(0, 1, 3)))
    lowered = [
        lowering.lowered(*given, **options, verifier=verify.block(), controller=controllers.fixed(3)),
        lowering.lowered_plainly(model, params, PROMPTS, LENGTHS, LIMITS, **options),
        lowering.lowered(*given, **options, verifier=verify.block(), controller=adaptive),
    ]
    return [hlo.parse(one.compile().as_text()) for one in lowered]


def test_logits_are_never_gathered_and_rows_never_sent():
    """Catches a product, a filter, a verifier or a cache write that XLA can do on whole arrays only: then logits are
    gathered (VOCAB columns), or rows go around by permutes. What may travel: activations, 32 columns wide, and a few
    numbers a row."""
    for program in _programs():
        looped = [step.instruction for step in hlo.collectives(program) if step.loops]
        assert looped  # they were found
        columns = [shape.dims for item in looped for shape in item.shapes if VOCAB in shape.dims[-1:]]
        assert columns == []
        assert [item.text for item in looped if item.op.startswith(("collective-permute", "all-to-all"))] == []


def test_two_all_reduces_per_layer():
    """Catches a cut that makes XLA repair what it broke: 2 layers of activations, and the embedding, a target pass."""
    # Of a round: the draft model's first step, outside its loop, has its own five.
    for program, wanted in zip(_programs(), (10, 5), strict=False):
        reduced = [
            shape.dims for step in hlo.collectives(program) for shape in step.instruction.shapes
            if step.loops == ("while[?]",) and step.instruction.op.startswith("all-reduce") and 32 in shape.dims
        ]  # fmt: skip
        assert len(reduced) == wanted, reduced


def test_parameters_lie_as_the_rules_say():
    """Catches a rule that matches nothing, and devices that hold more than their part."""
    layout = _layout(data=2, model=4)
    built = models.build(tiny.config("llama", vocab_size=VOCAB, **SHAPES["llama"]), layout=layout)
    specs = {name: place.spec for name, place in _named(models.shardings(built)).items()}
    cut_out, cut_in, whole = PartitionSpec(("model",)), PartitionSpec(None, ("model",)), PartitionSpec()
    layer = "model.layers.1."
    assert specs[f"{layer}self_attn.q_proj.weight"] == specs[f"{layer}mlp.up_proj.weight"] == cut_out
    assert specs[f"{layer}self_attn.k_proj.weight"] == specs["lm_head.weight"] == cut_out
    assert specs[f"{layer}self_attn.o_proj.weight"] == specs[f"{layer}mlp.down_proj.weight"] == cut_in
    assert specs[f"{layer}input_layernorm.weight"] == specs["model.norm.weight"] == whole
    _, params = _model("llama", layout)
    assert params["lm_head"]["weight"][...].addressable_shards[0].data.shape == (VOCAB // 4, 32)
    own = models.build(tiny.config("llama"), layout=layout, rules=[("embed", (None, "width"))])
    found = _named(models.shardings(own))
    assert [name for name, place in found.items() if place.spec != whole] == ["model.embed_tokens.weight"]


def _named(tree):
    return {
        models.family.tensor_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "spec"))
    }


def test_loaded_parameters_are_those_of_one_device(tmp_path):
    """Catches a part read from the wrong place of the file."""
    layout = _layout(data=2, model=4)
    alone = models.load(models.PRETRAINED / "draft")
    cut = models.load(models.PRETRAINED / "draft", layout=layout)
    for ours, theirs in zip(jax.tree.leaves(cut.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert cut.params["model"]["embed_tokens"]["weight"][...].addressable_shards[0].data.shape == (1024, 192)
    assert cut.model.layout.heads == ()  # one key/value head: attention is not cut, the rest is


@pytest.mark.parametrize(
    ("heads", "query_heads", "wanted"),
    [
        (8, 32, (("model", "sub"), ("model", "sub"))),
        (4, 32, (("model",), ("model", "sub"))),
        (2, 6, ((), ())),
        (12, 24, (("model",), ("model",))),  # three keys a device: queries may not be cut further
        (1, 8, ((), ("model", "sub"))),
    ],
)
def test_attention_is_cut_by_whole_heads(heads, query_heads, wanted):
    """Catches queries on another device than their keys."""
    given = sharding.layout(sharding.make_mesh(model=4, sub=2))
    fitted = sharding.fit(given, heads=heads, query_heads=query_heads)
    assert (fitted.heads, fitted.query) == wanted


def test_mistakes_are_named():
    """Catches errors out of XLA's depths."""
    layout = _layout(data=2, model=4)
    model, params = _model("llama", layout)
    with pytest.raises(ValueError, match="3 rows of prompts cannot be divided over 2 devices"):
        specjax.autoregressive(model, params, PROMPTS[:3])
    with pytest.raises(ValueError, match="needs 16 devices, there are 8"):
        sharding.make_mesh(data=16)
    for size, said in (("a", "a whole number, 1 or more, got 'a'"), (1.5, "a whole number, .*1.5"), (-1, "1 or more")):
        with pytest.raises(ValueError, match=f"model must be {said}"):
            sharding.make_mesh(model=size)  # type: ignore[arg-type]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("batch", "tensor"))
    with pytest.raises(ValueError, match="nothing is cut over 'batch', 'tensor'"):
        sharding.layout(mesh)
    assert sharding.layout(mesh, rows=("batch",), width=("tensor",)).heads == ("tensor",)
    with pytest.raises(ValueError, match="know the roles rows, width, heads, query, got 'model'"):
        models.random(tiny.config("llama"), jax.random.key(0), layout=layout, rules=[("embed", ("model",))])
    with pytest.raises(ValueError, match=r"rounds_per_test must be in 1\.\.65536, got 0"):
        specjax.autoregressive(model, params, PROMPTS, rounds_per_test=0)
