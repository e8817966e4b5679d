"""`specjax generate --model X` without a draft, and several prompts in plain output."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from typer.testing import CliRunner

import specjax
from specjax import models, text
from specjax.cli import main
from specjax.decode import plain as plainly
from specjax.types import Status

TEXTS = ["w1 w2 w3", "w4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model with a tokenizer of as many words."""
    path = tmp_path_factory.mktemp("alone") / "llama"
    model, params = tiny.model("llama", 2)
    loaded = models.random(tiny.config("llama"), jax.random.key(0))
    models.save(loaded._replace(model=model, params=params), path)
    made = Tokenizer(WordLevel({f"w{index}": index for index in range(tiny.VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(path / "tokenizer.json"))
    return str(path)


def _generate(folder, *options, status=0):
    out = CliRunner().invoke(main.app, ["generate", "--model", folder, "--max-new-tokens", "9", "--no-cache", *options])
    assert out.exit_code == status, out.output
    return out


@pytest.mark.parametrize("draft", [True, False])
def test_rows_that_emit_nothing_are_told(folder, tmp_path, draft):
    """Catches a division by no tokens where parameters are NaN, in place of what to do about it."""
    broken = str(tmp_path / "broken")
    loaded = models.load(folder)
    models.save(loaded._replace(params=jax.tree.map(lambda leaf: leaf * np.float32("nan"), loaded.params)), broken)
    page = ["--trace", str(tmp_path / "page.html")]
    out = _generate(broken, *(["--draft", broken] if draft else []), *page, TEXTS[0], status=1)
    assert "check the parameters" in " ".join(out.stderr.split())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_target_alone_decodes_plainly(folder, tmp_path, temperature):
    """Catches a target refused for want of a draft, other tokens than `autoregressive` draws, and drafts counted."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    options = ["--prompt-file", str(tmp_path / "prompts.txt"), "--json", "--temperature", str(temperature)]
    said = json.loads(_generate(folder, *options).stdout)
    target = models.load(folder)
    prompts = text.encode(text.load_tokenizer(folder), TEXTS)
    sampling = specjax.Sampling(temperature)
    plain = specjax.autoregressive(target.model, target.params, *prompts, max_new_tokens=9, sampling=sampling)
    assert [row["tokens"] for row in said["results"]] == plain.new_tokens()
    assert (said["draft_len"], said["controller"], said["draft_lengths"]) == (0, "none", [16])
    assert said["tokens_per_round"] == 1
    assert said["tokens_per_second"] > 0
    nothing = ("speedup", "plain_tokens_per_second", "predicted_speedup", "acceptance_rate", "draft_utilisation")
    assert [said[name] for name in nothing] == [None] * 5
    assert said["acceptance_by_position"] == []


def test_it_says_so(folder, tmp_path):
    """Catches a summary that speaks of a speed-up, and one that does not say how to get it."""
    out = _generate(folder, "w1", "--trace", str(tmp_path / "trace.html"))
    said = " ".join(out.stderr.split())
    assert "plain decoding" in said
    assert "no draft model one token a pass; --draft" in said
    assert not {"speed-up", "speculative", "acceptance"} & set(said.split())
    assert (tmp_path / "trace.html").is_file()


def test_a_controller_without_a_draft_is_refused(folder):
    """Catches an option that is passed over in silence."""
    out = CliRunner().invoke(main.app, ["generate", "w1", "--model", folder, "--controller", "additive", "--no-cache"])
    assert isinstance(out.exception, ValueError)
    assert "--controller additive chooses how many tokens to draft: it needs a --draft model" in str(out.exception)
    alone = CliRunner().invoke(main.app, ["generate", "w1", "--draft", folder, "--no-cache"])
    assert "--draft needs --model beside it" in str(alone.exception)


def test_several_prompts_are_told_apart_in_a_pipe(folder, tmp_path):
    """Catches texts that run into each other where there is no terminal, and a number before the only one."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    for batch in ("1", "2"):
        out = _generate(folder, "--prompt-file", str(tmp_path / "prompts.txt"), "--batch", batch)
        lines = out.stdout.splitlines()
        assert len(lines) == 2
        for row, (line, prompt) in enumerate(zip(lines, TEXTS, strict=True)):
            assert line.startswith(f"[{row}] {prompt}")
    assert _generate(folder, "w4").stdout.startswith("w4")


def test_every_round_is_a_plain_step():
    """Catches a controller that lets the drafter draft, whose tokens would all be rejected, at full cost."""
    model, params = tiny.model("llama", 2)
    prompts = np.array([[1, 2], [3, 0]])
    roles = (model, params, plainly.DRAFTER, ())
    out = specjax.generate(*roles, prompts, max_new_tokens=7, controller=plainly.CONTROLLER)
    plain = specjax.autoregressive(model, params, prompts, max_new_tokens=7)
    assert out.new_tokens() == plain.new_tokens()
    assert out.status.tolist() == [Status.LENGTH] * 2
    assert out.stats.by_longest.tolist() == [[6], [6]]
    assert (out.stats.rounds == plain.stats.rounds).all()
