"""The exactness suite on this machine's own backend: `specjax bench --verify exactness`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax import drafters, testing, text, verify
from specjax.cli.load_pair import Pair

PROMPTS = [
    "def merge_sort(items):",
    "import numpy as np\n\n\ndef",
    "class Stack:\n    def __init__(self):",
    "for index, value in enumerate(",
    "Once upon a time there was a little",
    "The quick brown fox",
    "if __name__ ==",
    "# Returns the sum of all even numbers\n",
]
_DRAFTS = 256  # rows of a check_drafter on a real pair


class Finding(NamedTuple):
    """What one check found."""

    check: str
    passed: bool
    detail: str
    seconds: float


def suite(pair: Pair, samples: int = 20_000) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """The checks, as (name, run): verifiers on distributions that can be enumerated, then the pair itself.

    Args:
      pair: target, draft and tokenizer.
      samples: sequences of each chi-square test.
    """
    target, draft = pair.target, pair.draft
    for name in ("rejection", "block", "coupled"):
        rule = getattr(verify, name)()
        title = f"verifier {name}: the target's distribution, 7 adversaries"
        yield _check(title, lambda rule=rule: _verifier(rule, samples))
    for name, loaded in (("target", target), ("draft", draft)):
        yield _check(f"model: {name}", lambda loaded=loaded: _model(loaded))
    yield _check("drafter: draft_model", lambda: _drafter(pair))
    yield _check("speculation against plain decoding", lambda: _pair(pair))


def _check(name: str, run: Callable[[], str]) -> tuple[str, Callable[[], Finding]]:
    def finding() -> Finding:
        began = time.perf_counter()
        try:
            detail, passed = run(), True
        except AssertionError as error:
            detail, passed = str(error), False
        # Linux allows a process 65,530 memory maps, and programs on CPU take up to 1,000 each: past that XLA crashes.
        jax.clear_caches()
        return Finding(name, passed, detail, time.perf_counter() - began)

    return name, finding


def _verifier(rule, samples: int) -> str:
    return f"{len(testing.check_verifier(rule, samples=samples))} cases"


def _model(loaded) -> str:
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(loaded.params)}
    tolerance = max(1e-3, 8 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes))
    checked = testing.check_model(loaded.model, loaded.params, tolerance=tolerance)
    return f"{len(checked)} properties, to {tolerance:.2g} of the largest logit"


def _drafter(pair: Pair) -> str:
    checked = testing.check_drafter(
        drafters.draft_model(pair.draft.model), pair.draft.params, target=pair.target.model,
        target_params=pair.target.params, samples=_DRAFTS,
    )  # fmt: skip
    return f"{len(checked)} properties"


def _pair(pair: Pair) -> str:
    prompts = text.encode(pair.tokenizer, PROMPTS, limit=pair.target.model.max_positions)
    found = testing.check_pair(
        pair.target.model, pair.target.params, drafters.draft_model(pair.draft.model), pair.draft.params,
        prompts.tokens, prompts.lengths,
    )  # fmt: skip
    return "\n".join(agreement.describe() for agreement in found)
