"""The ways to use a block, against transformers on whole texts: filled by several forwards, a tree, a kept path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import xla_options

from specjax import models, tree
from specjax.decode.prefill import prefill

TOLERANCE = 1e-4
VOCAB = 61
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {  # one of each way to tell positions apart: rotation, rotation and window, a table
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
PROMPTS = (9, 2, 6)  # lengths; the second is shorter than the window, the first longer


class Case(NamedTuple):
    """A model loaded by both, and texts longer than anything read here."""

    loaded: models.Loaded
    texts: np.ndarray  # [B, 24] int32
    says: Callable[[Any], np.ndarray]  # transformers: [T] -> [T, V]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, make_reference, reference_logits, tmp_path_factory) -> Case:
    reference = make_reference(request.param, **CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("blocks") / request.param
    reference.save_pretrained(folder)
    texts = np.random.default_rng(3).integers(0, VOCAB, (3, 24), np.int32)
    return Case(models.load(folder), texts, functools.partial(reference_logits, reference))


def test_one_block_filled_by_several_forwards(case):
    """Catches a forward that loses or misplaces what an earlier forward put in the same block, as a draft model does
    step by step, and a commit of only part of such a block; then a block of one token, and an empty commit."""
    model, params = case.loaded.model, case.loaded.params
    cache = _read_prompts(case)
    lengths = np.array(PROMPTS)
    for widths, keep in (((1, 1, 3), (5, 1, 3)), ((1,), (1, 0, 1)), ((1,), (0, 0, 0)), ((1, 1, 3), (2, 4, 0))):
        block = np.random.default_rng(sum(lengths)).integers(0, VOCAB, (3, sum(widths)), np.int32)
        for row, count in enumerate(keep):
            block[row, :count] = case.texts[row, lengths[row] : lengths[row] + count]
        logits, cache = _fill(model, widths, params, block, cache, np.array(keep))
        for row, count in enumerate(keep):
            end = lengths[row] + count
            _assert_close(np.asarray(logits)[row, :count], case.says(case.texts[row, :end])[lengths[row] :])
        lengths = lengths + keep
    assert cache.lengths.tolist() == lengths.tolist()


# Draft tokens by their parents (-1 is the root): a different shape in each row. Block slot 0 is the root.
PARENTS = ((-1, -1, 0, 0, 1, 2), (-1, 0, 0, -1, 3, 4), (-1, 0, 1, 2, 3, 4))


def test_tree_branches_match_the_text_of_the_branch(case):
    """Catches a node that sees its siblings or its cousins, takes its position from its slot and not from its depth,
    or measures the window by slots; and one tree used for all rows."""
    model, params = case.loaded.model, case.loaded.params
    cache = _read_prompts(case)
    nodes = np.random.default_rng(5).integers(0, VOCAB, (3, 7), np.int32)
    depths, visible = _tree_of_each_row()
    logits, _ = _fill_tree(model, params, nodes, cache, depths, visible, np.zeros(3, np.int32), None)
    for row, length in enumerate(PROMPTS):
        for slot in range(7):
            branch = _branch(PARENTS[row], slot)
            text = [*case.texts[row, :length], *nodes[row, branch]]
            _assert_close(np.asarray(logits)[row, slot], case.says(text)[-1])


def test_commit_along_a_path_then_go_on(case):
    """Catches a commit that takes the block's first slots instead of the path, keeps a sibling, or leaves the row at
    the wrong length: what follows must read as the plain text of the branch, with rejected nodes forgotten."""
    model, params = case.loaded.model, case.loaded.params
    cache = _read_prompts(case)
    nodes = np.random.default_rng(6).integers(0, VOCAB, (3, 7), np.int32)
    depths, visible = _tree_of_each_row()
    leaves, keep = (5, 6, 4), np.array([3, 4, 2])  # the last row keeps part of its path only
    paths = [_branch(parents, leaf) for parents, leaf in zip(PARENTS, leaves, strict=True)]
    longest = max(len(path) for path in paths)
    padded = np.array([path + [0] * (longest - len(path)) for path in paths], np.int32)
    _, cache = _fill_tree(model, params, nodes, cache, depths, visible, keep, padded)
    lengths = np.array(PROMPTS) + keep
    assert cache.lengths.tolist() == lengths.tolist()
    block = case.texts[:, -5:]
    for widths in ((1, 1, 3), (1, 1, 3)):  # nothing is kept the first time: reading twice must say the same
        logits, cache = _fill(model, widths, params, block, cache, np.zeros(3, np.int32))
        for row, length in enumerate(PROMPTS):
            kept = nodes[row, paths[row][: keep[row]]]
            text = [*case.texts[row, :length], *kept, *block[row]]
            _assert_close(np.asarray(logits)[row], case.says(text)[-5:])


@pytest.mark.parametrize("case", ["mistral"], indirect=True)  # no model has a part in this: cache.place does it
def test_one_tree_for_all_rows_is_the_same_tree_in_each(case):
    """Catches depths [T] and visible [T, N] that are read otherwise than [B, T] and [B, T, N]."""
    model, params = case.loaded.model, case.loaded.params
    cache = _read_prompts(case)
    nodes = np.random.default_rng(7).integers(0, VOCAB, (3, 7), np.int32)
    shape = tree.layout(np.array(PARENTS[0], np.int32))
    depths, visible = np.asarray(shape.depths)[0], np.asarray(shape.visible)[0]
    nothing = np.zeros(3, np.int32)
    shared, _ = _fill_tree(model, params, nodes, cache, depths, visible, nothing, None)
    each, _ = _fill_tree(
        model, params, nodes, cache, np.tile(depths, (3, 1)), np.tile(visible, (3, 1, 1)), nothing, None
    )
    _assert_close(shared, each)


@pytest.mark.parametrize("case", ["mistral"], indirect=True)  # no model has a part in this: cache.place does it
def test_a_tree_grown_level_by_level_matches_its_branches(case):
    """Catches depths counted from the first token of the forward instead of from the block's first slot."""
    model, params = case.loaded.model, case.loaded.params
    cache = _read_prompts(case)
    nodes = np.random.default_rng(8).integers(0, VOCAB, (3, 7), np.int32)
    depths, visible = _tree_of_each_row()
    logits = _grow_tree(model, (1, 2, 4), params, nodes, cache, depths, visible)
    for row, length in enumerate(PROMPTS):
        text = [*case.texts[row, :length], *nodes[row, _branch(PARENTS[row], 6)]]
        _assert_close(np.asarray(logits)[row, 6], case.says(text)[-1])


def _assert_close(got, wanted) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


def _branch(parents: tuple[int, ...], slot: int) -> list[int]:
    """Block slots from the root to `slot`."""
    slots = [slot]
    while slots[-1] > 0:
        slots.append(parents[slots[-1] - 1] + 1)
    return slots[::-1]


def _tree_of_each_row() -> tuple[np.ndarray, np.ndarray]:
    """depths [B, T] and visible [B, T, N], made from the branches and not by specjax.tree."""
    depths, visible = np.zeros((3, 7), np.int32), np.zeros((3, 7, 7), bool)
    for row, parents in enumerate(PARENTS):
        for slot in range(7):
            branch = _branch(parents, slot)
            depths[row, slot] = len(branch) - 1
            visible[row, slot, branch] = True
    return depths, visible


def _read_prompts(case: Case):
    model, params = case.loaded.model, case.loaded.params
    prompts = case.texts[:, : max(PROMPTS)]
    return _prefill(model, params, prompts, np.array(PROMPTS), model.init_cache(params, 3, 64))


# Compiling is most of the time here, and the programs are run once or twice: so compile them badly.
_jit = functools.partial(jax.jit, compiler_options=xla_options.OPTIONS)


@functools.partial(_jit, static_argnums=0)
def _prefill(model, params, prompts, lengths, cache):
    return prefill(model, params, prompts, lengths, cache).cache


@functools.partial(_jit, static_argnums=(0, 1))
def _fill(model, widths, params, tokens, cache, keep):
    """Fills one block by forwards of these widths, and commits `keep` of it."""
    block = model.init_block(params, *tokens.shape)
    logits, start = [], 0
    for width in widths:
        out = model.apply(params, tokens[:, start : start + width], cache, block)
        block, start = out.block, start + width
        logits.append(out.logits)
    return jax.numpy.concatenate(logits, 1), model.commit(cache, block, keep, None)


@functools.partial(_jit, static_argnums=0)
def _fill_tree(model, params, nodes, cache, depths, visible, keep, path):
    block = model.init_block(params, *nodes.shape)
    out = model.apply(params, nodes, cache, block, depths=depths, visible=visible)
    return out.logits, model.commit(cache, out.block, keep, path)


@functools.partial(_jit, static_argnums=(0, 1))
def _grow_tree(model, widths, params, nodes, cache, depths, visible):
    block = model.init_block(params, *nodes.shape)
    logits, start = [], 0
    for width in widths:
        new = slice(start, start + width)
        out = model.apply(params, nodes[:, new], cache, block, depths=depths[:, new], visible=visible[:, new])
        block, start = out.block, start + width
        logits.append(out.logits)
    return jax.numpy.concatenate(logits, 1)
