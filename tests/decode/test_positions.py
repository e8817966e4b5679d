"""Models with a last position: what fits exactly is accepted, whatever prompts and buffers are rounded up to."""

from __future__ import annotations

import functools
import json
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from typer.testing import CliRunner

import specjax
from specjax import Status, models, text
from specjax.cli import choose_controller, main

POSITIONS = 50


@functools.cache
def _model(positions: int = POSITIONS):
    return tiny.model("gpt2", 3, n_positions=positions)


def _tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({f"w{index}": index for index in range(tiny.VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def _text(count: int) -> str:
    return " ".join(f"w{index * 7 % tiny.VOCAB}" for index in range(count))


def _roles(positions: int = POSITIONS):
    model, params = _model(positions)
    return model, params, specjax.drafters.draft_model(model), params


@pytest.mark.parametrize("new", [5, 10])
def test_what_fits_is_generated(new, caplog):
    """Catches 40 + 5 refused at 50 positions because 40 is padded to 64, and a warning where nothing is cut off."""
    roles = _roles()
    prompts = text.encode(_tokenizer(), [_text(40), _text(3)], limit=roles[0].max_positions)
    wide = np.pad(prompts.tokens, ((0, 0), (0, 64 - prompts.tokens.shape[1])))
    with caplog.at_level(logging.WARNING, "specjax"):
        plain = specjax.autoregressive(*roles[:2], wide, prompts.lengths, max_new_tokens=new)
        outs = [specjax.generate(*roles, tokens, prompts.lengths, max_new_tokens=new) for tokens in (prompts[0], wide)]
        chunks = list(specjax.stream(*roles, wide, prompts.lengths, max_new_tokens=new))
        small = specjax.generate(*roles, wide, prompts.lengths, max_new_tokens=new, capacity=40 + new)
    for out in (plain, small, *outs):
        assert out.status.tolist() == [Status.LENGTH] * 2
        assert out.new_tokens() == plain.new_tokens()
    streamed = [[token for chunk in chunks for token in chunk.tokens[row]] for row in (0, 1)]
    assert streamed == plain.new_tokens()
    narrow = specjax.autoregressive(*roles[:2], wide[:1, :40], max_new_tokens=new)
    assert narrow.new_tokens()[0] == plain.new_tokens()[0]  # padding that was cut was padding
    assert not caplog.records


def test_the_shape_of_a_real_gpt2(caplog):
    """Catches 910 + 100 warned of at 1,024 positions, where the prompt is padded to 928."""
    model, params = tiny.model("gpt2", 3, n_positions=1024, n_layer=1, n_embd=8)
    drafter = specjax.drafters.draft_model(model)
    with caplog.at_level(logging.WARNING, "specjax"):
        words = text.generate_text(model, params, drafter, params, _tokenizer(), [_text(910)], max_new_tokens=100)
    assert len(words[0].split()) == 100
    assert not caplog.records


def test_only_rows_that_get_there_are_warned_of(caplog):
    """Catches a warning that padding caused, and the loss of the one that is due."""
    model, params = _model()
    prompts, lengths = np.ones((2, 40), np.int32), np.array([40, 2])
    with caplog.at_level(logging.WARNING, "specjax"):
        specjax.autoregressive(model, params, prompts, lengths, max_new_tokens=np.array([10, 48]))
        assert not caplog.records
        out = specjax.autoregressive(model, params, prompts, lengths, max_new_tokens=np.array([11, 48]))
    assert [record.getMessage() for record in caplog.records] == [
        "max_new_tokens=48 asks for more than the model's 50 positions: rows that get there end as CACHE_FULL"
    ]
    assert out.status.tolist() == [Status.CACHE_FULL, Status.LENGTH]


def test_traced_lengths_say_what_to_do():
    """Catches a refusal whose capacity nobody asked for, where only the caller knows what is padding."""
    model, params = _model()
    prompts = np.ones((1, 64), np.int32)

    def call(lengths, width=64):
        return specjax.autoregressive(model, params, prompts[:, :width], lengths, max_new_tokens=5, capacity=50).lengths

    with pytest.raises(ValueError, match=r"64 columns.*capacity=50.*cut the prompts"):
        jax.jit(call)(jnp.array([40]))
    without = lambda lengths: specjax.autoregressive(model, params, prompts, lengths, max_new_tokens=5)  # noqa: E731
    with pytest.raises(ValueError, match=r"64 columns and the model 50 positions.*traced.*prompts\[:, :50\]"):
        jax.jit(without)(jnp.array([40]))
    assert jax.jit(functools.partial(call, width=50))(jnp.array([40])).tolist() == [45]


def test_a_prompt_past_the_positions_is_named():
    """Catches a prompt cut in silence, and a message that speaks of columns to someone who gave texts."""
    with pytest.raises(ValueError, match="prompt 1 has 51 tokens, and the model has 50 positions: shorten it"):
        text.encode(_tokenizer(), [_text(3), _text(51)], limit=POSITIONS)
    assert text.encode(_tokenizer(), [_text(3), _text(50)], limit=POSITIONS).tokens.shape == (2, 50)


@pytest.mark.parametrize(
    ("positions", "length", "new", "status"),
    [(100, 70, 5, "length"), (100, 70, 128, "cache_full"), (1024, 910, 100, "length")],
)
def test_the_command_line_takes_what_fits(tmp_path, positions, length, new, status):
    """Catches every prompt of a short model refused because buffers are made in steps of 128, and 910 + 100 of a real
    one; what does not fit is said before, and the text ends where the positions do."""
    config = tiny.config("gpt2", n_positions=positions)
    models.save(models.random(config, jax.random.key(0)), tmp_path / "gpt2")
    _tokenizer().save(str(tmp_path / "gpt2" / "tokenizer.json"))
    folder = str(tmp_path / "gpt2")
    arguments = [
        "generate",
        _text(length),
        "--model",
        folder,
        "--draft",
        folder,
        "--no-cache",
        "--no-baseline",
        "--json",
    ]
    out = CliRunner().invoke(main.app, [*arguments, "--max-new-tokens", str(new)])
    assert out.exit_code == 0, out.output
    (row,) = json.loads(out.stdout)["results"]
    assert (len(row["tokens"]), row["status"]) == (min(new, positions - length), status)
    if status == "length":
        assert out.stderr == ""
    else:
        assert "the target has 100 positions, prompt and new tokens may need 198" in " ".join(out.stderr.split())


@pytest.mark.parametrize(
    ("positions", "context", "wanted"), [(None, 90, 64), (100, 90, 64), (50, 90, 44), (50, 30, 30)]
)
def test_profiles_are_of_lengths_that_exist(positions, context, wanted):
    """Catches a profile for a context past the last position, which is refused."""
    pair = SimpleNamespace(target=SimpleNamespace(model=SimpleNamespace(max_positions=positions)))
    assert choose_controller._shared(context, 5, pair) == wanted  # type: ignore[arg-type]
