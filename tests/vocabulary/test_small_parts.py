"""Trees, statistics, text, import layers: the parts that need few lines each."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import models, stats, testing, text, tree
from specjax.types import Draft

PACKAGE = Path(specjax.__file__).resolve().parent

VOCABULARY = {
    "batch", "cache", "costs", "dtypes", "integers", "logs", "noise", "processors", "results", "rows", "sampling",
    "sharding", "stats", "status", "traced", "types",
}  # fmt: skip
# Lower may not import higher; a module may import its own layer.
LAYERS = [
    VOCABULARY | {"kernels"},
    {"verify", "tree", "controllers", "adapters", "models"},
    {"decode"},
    {"drafters", "profiling", "viewer", "detokenize"},
    {"testing", "text", "aot"},
    {"cli"},
]


def _files() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *(PACKAGE / "models").glob("*.py")]  # rglob follows no link


def _imports(file: Path) -> set[str]:
    """The specjax modules that a file imports, by their first name below the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "specjax":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("specjax.")}
    return found


def test_imports_point_down():
    """Catches the core importing an architecture or the command line."""
    rank = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    files = [file for file in _files() if file != PACKAGE / "__init__.py"]
    assert {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in files} == set(rank)
    for file in files:
        own, imported = file.relative_to(PACKAGE).parts[0].removesuffix(".py"), _imports(file)
        for name in imported & rank.keys():
            assert rank[name] <= rank[own], f"{file} imports {name}, which lies above it"
        if own == "models":
            assert imported <= {"types", "cache", "sharding", "logs", "dtypes", "models"}, file
        elif own not in ("aot", "text", "cli"):
            assert "models" not in imported, f"{file} must not know an architecture"


def test_the_vocabulary_is_flat_and_all_else_has_a_wing():
    """Catches a module of the command line or of a wing beside the words that authors of parts use."""
    flat = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert flat == VOCABULARY | {"text"}


def test_only_the_command_line_prints_by_its_libraries():
    """Catches a library call that needs typer or rich, which are extras."""
    for file in _files():
        names = [
            node
            for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for node in names:
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if {name.split(".")[0] for name in imported} & {"typer", "rich"}:
                assert "cli" in file.relative_to(PACKAGE).parts, f"{file} imports {imported}"


def test_every_file_is_one_algorithm():
    """Catches files that grow past what a reader holds: 350 lines at most."""
    for file in _files():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 350, file


def test_tree_layout():
    """Catches a node that sees its sibling, or not its grandparent."""
    shape = tree.layout(jnp.array([[-1, -1, 0, 2], [-1, 0, 1, 2]]))
    assert shape.depths.tolist() == [[0, 1, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert shape.visible[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1],
    ]  # fmt: skip
    assert (shape.visible[1] == jnp.tril(jnp.ones((5, 5), bool))).all()


@pytest.mark.parametrize("order", [1, 3])
def test_a_chain_is_a_tree_with_one_child_each(order):
    """Catches a loop that treats a draft with parents differently from a chain."""
    model = testing.table_model(order, 7)
    table = testing.random_table(jax.random.key(1), order=order, vocab_size=7, sharpness=2.0)
    worse = jnp.where(jax.random.uniform(jax.random.key(2), table.shape) < 0.3, 0.0, table)
    chain = specjax.drafters.draft_model(model)

    def propose(params, state, context, plan):
        draft, state = chain.propose(params, state, context, plan)
        return Draft(draft.tokens, draft.lengths, draft.probs, jnp.arange(plan.longest) - 1), state

    treed = chain._replace(propose=propose)
    prompts = jnp.array([[1, 2, 3], [4, 5, 6]])
    for temperature in (0.0, 1.0):
        one, other = (
            specjax.generate(
                model, table, drafter, worse, prompts, max_new_tokens=20, sampling=specjax.Sampling(temperature)
            )
            for drafter in (chain, treed)
        )
        assert one.new_tokens() == other.new_tokens()


@pytest.mark.parametrize(
    ("alpha", "cost", "draft_len", "speedup"),
    [(0.6, 0.01, 7, 2.30), (0.9, 0.01, 24, 7.49), (0.8, 0.05, 8, 3.09), (0.7, 0.1, 4, 1.98), (0.9, 0.2, 7, 2.37)],
)
def test_predicted_speedup_matches_the_published_table(alpha, cost, draft_len, speedup):
    """Catches a wrong formula: values of Leviathan et al., theorem 3.8, tabulated in FIELD.md."""
    assert stats.predicted_speedup(alpha, draft_len, cost) == pytest.approx(speedup, abs=0.006)


def test_statistics_of_nothing_are_nan():
    """Catches a division by zero where a row never drafted."""
    empty = stats.zeros(1, 2)
    assert np.isnan(stats.acceptance_rate(empty))
    assert np.isnan(stats.tokens_per_round(empty))
    assert np.isnan(stats.acceptance_by_position(empty)).all()


def test_prompts_are_padded_to_buckets():
    """Catches a new program for every prompt length."""
    assert text.pad_prompts([[1] * 5, [2] * 33]).tokens.shape == (2, 64)
    assert text.pad_prompts([np.array([1, 2]), (3,)], bucket=np.int32(2)).tokens.tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[1], []], {}, "prompt 1 has no token: .*BOS"),
        ([[1], np.zeros(0)], {}, "prompt 1 .*float64"),
        ([], {}, r"prompts is empty: .*\[\[5, 6\]\]"),
        (3, {}, "prompts must be a list of lists of ids, .*got int"),
        ([1, 2], {}, r"prompt 0 must be a list of ids, got 1: for a single prompt pass \[ids\]"),
        (["ab"], {}, "prompt 0 must hold token ids .*got text: encode it first"),
        ([[1.5]], {}, "prompt 0 must hold integers .*float64"),
        ([[True]], {}, "prompt 0 must hold integers .*bool"),
        ([[1], [2, -1]], {}, r"each id of prompt 1 must be in 0\.\.2147483647, got -1"),
        ([[2**40]], {}, "each id of prompt 0 must be in .*got 1099511627776"),
        ([[2**70]], {}, f"each id of prompt 0 must be in .*got {2**70}"),
        ([[1]], {"bucket": 0}, r"bucket must be in 1\.\.1048576, got 0"),
        ([[1]], {"bucket": 2.0}, "bucket must be a whole number, .*got 2.0"),
        ([[1]], {"bucket": 2**40}, "bucket must be in .*got 1099511627776"),
        ([[1]], {"limit": -1}, "limit must be 1 or more, got -1"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, options, said):
    """Catches 1.5 read as id 1, and errors of NumPy and Python that name no argument."""
    with pytest.raises(ValueError, match=said):
        text.pad_prompts(prompts, **options)


def test_streamed_text_is_generated_text():
    """Catches spaces lost between tokens, and characters split over tokens."""
    pair = [models.load(models.PRETRAINED / name, dtype=jnp.float32) for name in ("target", "draft")]
    drafter = specjax.drafters.draft_model(pair[1].model)
    tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    texts = ["import numpy", "# naïve café → ✓\ndef f("]
    arguments = (pair[0].model, pair[0].params, drafter, pair[1].params, tokenizer, texts)
    whole = text.generate_text(*arguments, max_new_tokens=24)
    rows = ["", ""]
    for piece in text.stream_text(*arguments, max_new_tokens=24):
        rows[piece.row] += piece.text
    assert rows == whole


def test_a_folder_without_tokenizer_says_so(tmp_path):
    """Catches a traceback from deep inside the tokenizer library."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*AutoTokenizer"):
        text.load_tokenizer(tmp_path)
