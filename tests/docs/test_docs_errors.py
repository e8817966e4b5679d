"""docs/errors.md quotes messages as they are raised: every one of them, and nothing else."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import flax_modules
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import specjax
from specjax import Status, adapters, dtypes, models, sharding, testing, text
from specjax.aot import topology
from specjax.cli import bench, choose_controller, error_hints, load_pair, main
from specjax.decode import arguments  # fmt: skip
from specjax.decode.stream import warn_of_troubles
from specjax.detokenize import stop_strings

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

MODEL = testing.table_model(1, 8)
TABLE = testing.random_table(jax.random.key(0), order=1, vocab_size=8)
DRAFTER = specjax.drafters.draft_model(MODEL)
PROMPTS = jnp.array([[1, 2, 3], [4, 5, 0]])


def _plain(model=MODEL, params=TABLE, prompts=PROMPTS, **options):
    return specjax.autoregressive(model, params, prompts, **options)


def _fast(prompts=PROMPTS, drafter=DRAFTER, **options):
    return specjax.generate(MODEL, TABLE, drafter, TABLE, prompts, **options)


def _without(module, call):
    """Calls what needs a package that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        call()


def _positions():
    config = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 10}
    loaded = models.random(config, jax.random.key(0))
    return loaded.model, loaded.params


def _in_x64():
    with jax.enable_x64(True):
        _plain()


def _no_tokenizer():
    text.load_tokenizer(folders.changed())


def _broken_tokenizer():
    Path(folders.changed(), "tokenizer.json").write_text("{")
    text.load_tokenizer("my-model")


def _cut_by_the_tokenizer():
    tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    tokenizer.enable_truncation(8)
    text.encode(tokenizer, ["x", "def " * 20])


def _nothing_to_control():
    alone = load_pair.Pair(models.random(tiny.config("llama"), jax.random.key(0)), None, None)
    given = {"batch": 1, "context": 8, "sampling": specjax.Sampling(), "verifier": specjax.verify.rejection()}
    choose_controller.choose(choose_controller.Policy.additive, alone, 3, kept_in=None, busy=None, **given)  # type: ignore[arg-type]


def _saved_twice():
    models.save(models.random(tiny.config("llama"), jax.random.key(0)), folders.changed())


def _int8():
    models.save(models.quantize(models.load(models.PRETRAINED / "draft")), "small")


def _exchanged():
    draft = models.random(tiny.config("llama"), jax.random.key(0))
    _plain(draft.model, {"only": TABLE})


def _out_of_memory():
    try:
        jnp.zeros((1 << 46,), jnp.int8).block_until_ready()
    except RuntimeError as error:
        raise ValueError(error_hints.explain(error)) from None


def _no_device():
    command = [sys.executable, "-m", "specjax.cli", "generate", "x"]
    env = {**os.environ, "JAX_PLATFORMS": "bogus"}
    said = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, cwd=PAGE.parent.parent)
    assert said.returncode == 2
    raise ValueError(said.stderr.removeprefix("specjax: "))


def _adapted(kind, **options):
    return adapters.from_nnx(kind(nnx.Rngs(0)), **options)


def _half_a_state():
    adapted = _adapted(flax_modules.Stack)
    _plain(adapted.model, nnx.state(flax_modules.SharedCursor(nnx.Rngs(0))))


def _a_module_for_its_state():
    _plain(_adapted(flax_modules.Stack).model, flax_modules.Stack(nnx.Rngs(0)))


def _a_narrower_state():
    adapted = _adapted(flax_modules.RowCursors)
    _plain(adapted.model, jax.tree.map(lambda leaf: leaf[..., :8], adapted.params))


def _a_tables_end():
    adapted = _adapted(flax_modules.Table, max_positions=40)
    draft = specjax.drafters.draft_model(adapted.model)
    specjax.generate(adapted.model, adapted.params, draft, adapted.params, PROMPTS, max_new_tokens=60)


def _past_the_trial():
    adapted = _adapted(flax_modules.Sliced)
    _plain(adapted.model, adapted.params, max_new_tokens=61)


def _profiled(device):
    found = specjax.costs.Costs(2, 64, 1.0, (1.0, 1.2), (0.0, 0.1), 0.0)
    return specjax.controllers.throughput(specjax.costs.Profile(device, (0, 1), (found,)))


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, logits, tokens, length):
        return logits


ERRORS = {
    "one prompt": lambda: _plain(prompts=jnp.array([1, 2])),
    "ragged": lambda: _plain(prompts=[[1, 2], [3]]),
    "floats": lambda: _plain(prompts=PROMPTS.astype(jnp.float32)),
    "an empty row": lambda: _plain(prompt_lengths=jnp.array([3, 0])),
    "an id outside": lambda: _plain(prompts=jnp.array([[1, 2, 3], [4, 8, 0]])),
    "small capacity": lambda: _plain(capacity=2),
    "past the positions": lambda: _plain(*_positions(), capacity=11),
    "traced lengths": lambda: jax.jit(
        lambda lengths: _plain(*_positions(), jnp.ones((1, 64), jnp.int32), prompt_lengths=lengths, max_new_tokens=3)
    )(jnp.array([3])),
    "traced limit": lambda: jax.jit(lambda n: _plain(max_new_tokens=n))(3),
    "an integer key": lambda: _plain(key=3),
    "temperature": lambda: _plain(sampling=specjax.Sampling(-1.0)),
    "top-p": lambda: _plain(sampling=specjax.Sampling(1.0, top_p=0.0)),
    "bias": lambda: _plain(sampling=specjax.Sampling(logit_bias={3: 1.0})),  # type: ignore[arg-type]
    "processor": lambda: _plain(processor=_Unhashable()),
    "a processor's shape": lambda: _plain(processor=lambda logits, tokens, length: logits[:3]),
    "x64": _in_x64,
    "vocabularies": lambda: _fast(drafter=specjax.drafters.draft_model(testing.table_model(1, 9))),
    "greedy asked to sample": lambda: _fast(sampling=specjax.Sampling(0.5), verifier=specjax.verify.greedy()),
    "another state": lambda: _fast(
        controller=specjax.controllers.additive(4), controller_state=jnp.zeros((3,), jnp.int32)
    ),
    "a negative draft": lambda: _fast(max_draft_len=-1),
    "no draft": lambda: specjax.controllers.fixed(0),
    "a loaded model": lambda: _plain(models.random(tiny.config("llama"), jax.random.key(0))),
    "a loaded draft": lambda: specjax.drafters.draft_model(models.random(tiny.config("llama"), jax.random.key(0))),
    "a drafter not wrapped": lambda: _fast(drafter=MODEL),
    "exchanged": _exchanged,
    "new_tokens under jit": lambda: jax.jit(lambda: _plain(max_new_tokens=2).new_tokens())(),
    "stream under jit": lambda: jax.jit(lambda x: specjax.stream(MODEL, TABLE, DRAFTER, TABLE, x, capacity=9))(PROMPTS),
    "one text": lambda: text.encode(None, "import os"),  # type: ignore[arg-type]
    "an empty text": lambda: text.encode(text.load_tokenizer(models.PRETRAINED / "target"), ["import os", ""]),
    "a long text": lambda: text.pad_prompts([[1], [1] * 51], limit=50),
    "a text that is cut": _cut_by_the_tokenizer,
    "an empty stop string": lambda: stop_strings.stop_strings(["\n", ""]),
    "too few devices": lambda: sharding.make_mesh(model=16, devices=jax.devices()[:1]),
    "rows on a mesh": lambda: sharding.check_batch(sharding.layout(sharding.make_mesh(data=2)), 3),
    "nowhere": lambda: models.load("/proc/nowhere"),
    "no config": lambda: (Path("my-model").mkdir(), models.load("my-model")),
    "no weights": folders.no_folder_of_weights,
    "cut off": folders.cut_off,
    "a shard missing": folders.shard_missing,
    "unknown family": lambda: models.load(folders.changed(model_type="mamba", architectures=["MambaForCausalLM"])),
    "an encoder-decoder": lambda: models.build(
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    ),
    "a folder of llama2.c": folders.llama2c,
    "a field missing": lambda: models.load(folders.changed(hidden_size=None)),
    "unknown activation": lambda: models.load(folders.changed(hidden_act="swoosh")),
    "unknown rope": lambda: models.load(folders.changed(rope_parameters={"rope_type": "helix"})),
    "names": lambda: folders.with_tensors(lambda tensors: tensors.pop("lm_head.weight")),
    "shapes": lambda: folders.with_tensors(
        lambda tensors: tensors.update({"model.norm.weight": np.ones(31, np.float32)})
    ),
    "no tokenizer": _no_tokenizer,
    "a broken tokenizer": lambda: (
        Path(folders.changed(), "tokenizer.json").write_text("{"),
        text.load_tokenizer("my-model"),
    ),
    "saved twice": _saved_twice,
    "int8": _int8,
    "the hub": lambda: models.load("owner/model"),
    "half a pair": lambda: load_pair.load_pair("my-model", None, None, None),
    "a controller without a draft": _nothing_to_control,
    "unknown dtype": lambda: dtypes.floating("float33"),
    "an integer dtype": lambda: dtypes.floating("int32"),
    "a dtype too wide": lambda: models.load(models.PRETRAINED / "draft", dtype="float64"),
    "no prompt": lambda: main._prompts(None, None),
    "no prompt file": lambda: main._prompts(None, Path("prompts.txt")),
    "an empty prompt file": lambda: (Path("prompts.txt").write_text("\n"), main._prompts(None, Path("prompts.txt"))),
    "another encoding": lambda: (
        Path("prompts.txt").write_text("x", encoding="utf-16"),
        main._prompts(None, Path("prompts.txt")),
    ),
    "a mesh": lambda: main._axes("data:1"),
    "a topology": lambda: topology.num_chips("v9z:2x2"),
    "no safetensors": lambda: _without("safetensors", lambda: models.load(models.PRETRAINED / "draft")),
    "no tokenizers": lambda: _without("tokenizers", lambda: text.load_tokenizer(models.PRETRAINED / "draft")),
    "no libtpu": lambda: _without("libtpu", lambda: topology.make_mesh("v5e:2x16", {})),
    "too few tokens": lambda: bench.prepare(None, bench.Setting(max_new_tokens=20)),  # type: ignore[arg-type]
    "not causal": lambda: _adapted(flax_modules.Bidirectional),
    "rows mixed": lambda: _adapted(flax_modules.Mixing),
    "dropout": lambda: _adapted(flax_modules.Loud),
    "blind": lambda: _adapted(flax_modules.Blind),
    "images": lambda: _adapted(flax_modules.Vision),
    "no logits": lambda: _adapted(flax_modules.NoLogits),
    "a forced strategy": lambda: _adapted(flax_modules.Stack, strategy="per-row"),
    "half a state": _half_a_state,
    "a cache nobody takes": lambda: _adapted(flax_modules.Stack, init_cache=lambda batch, slots: {}),
    "a module for its state": _a_module_for_its_state,
    "a narrower state": _a_narrower_state,
    "a table's end": _a_tables_end,
    "shapes past the trial": _past_the_trial,
    "slots ignored": lambda: _adapted(flax_modules.FixedSlots, strategy="at-end"),
    "memory": _out_of_memory,
    "device": _no_device,
}


WARNINGS = {
    "a row in trouble": lambda: warn_of_troubles(np.array([Status.LENGTH, Status.CACHE_FULL])),
    "positions": lambda: arguments._capacity(_positions()[0], 3, 50, np.array([3]), None),
    "another device": lambda: _profiled("another chip").init(2),
    "other batches": lambda: _profiled(jax.devices()[0].device_kind).init(5),
    "a large draft": lambda: load_pair.load_pair(
        *(str(models.PRETRAINED / name) for name in ("draft", "target")), None, None
    ),
}


def _blocks() -> list[str]:
    blocks = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [" ".join(block.split()) for block in blocks]


def _quoted(message: str) -> list[str]:
    """The blocks that a message could be, whatever stands for "..." in them."""
    said = " ".join(message.split())
    return [block for block in _blocks() if re.fullmatch(re.escape(block).replace("…", ".*"), said)]


def _raised(case: str) -> str:
    with pytest.raises((ValueError, OSError, ImportError)) as caught:
        ERRORS[case]()
    return str(caught.value)


def _warned(case: str, caplog) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "specjax"):
        WARNINGS[case]()
    (record,) = caplog.records
    return record.getMessage()


@pytest.mark.parametrize("case", ERRORS)
def test_the_page_quotes_what_is_raised(case, tmp_path, monkeypatch):
    """Catches a page that promises another message than the one a user meets, and a message that is gone."""
    monkeypatch.chdir(tmp_path)
    message = _raised(case)
    assert _quoted(message), f"docs/errors.md does not quote: {message}"


@pytest.mark.parametrize("case", WARNINGS)
def test_the_page_quotes_what_is_logged(case, caplog):
    """The same for warnings, which nobody sees until they listen."""
    message = _warned(case, caplog)
    assert _quoted(message), f"docs/errors.md does not quote: {message}"


def test_the_page_quotes_nothing_else():
    """Catches a quotation that no case above raises: there must be as many of one as of the other, all different."""
    blocks = _blocks()
    assert len(blocks) == len(set(blocks)) == len(ERRORS) + len(WARNINGS)


def test_every_status_is_explained():
    """Catches a status that was added, or whose remedy was rewritten, behind the page's back."""
    page = PAGE.read_text(encoding="utf-8")
    for status in Status:
        assert f"| `{status.name}` | {status.describe()} |" in page
