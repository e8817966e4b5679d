"""What the shipped pair does, for the figures and tables of these pages: writes measured.json. Minutes on two cores.

    python docs/figures/measure.py

Besides the draft model: the n-gram drafter of write-a-drafter.md, as it stands there. Counts, not times: a busy machine
changes nothing. The prompts are benchmarks/prompts.py's, which need the shared corpora. Last, what
`specjax.profiling.roofline` allows by batch, which needs no run and no device.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import specjax
from specjax import controllers, models, stats, text
from specjax.aot import shapes
from specjax.profiling import roofline
from specjax.profiling.machine import Machine, known

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from prompts import code_prompts

TEMPERATURES = (0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
LONGEST, COMPARED_LONGEST = 8, 5
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LIVE, ALPHA, LIMIT_LONGEST = 1024, 0.8, 4
SHOWN, SHOWN_LONGEST = "def binary_search(items, target):", 4


def main() -> None:
    """Acceptance by position and temperature, and one round in full."""
    target, draft = (models.load(models.PRETRAINED / name, dtype=jnp.float32) for name in ("target", "draft"))
    tokenizer = text.load_tokenizer(models.PRETRAINED / "target")
    prompts = code_prompts(tokenizer, 16)
    drafter = specjax.drafters.draft_model(draft.model)
    found: dict[str, Any] = {
        "jax": jax.__version__,
        "matplotlib": version("matplotlib"),
        "longest": LONGEST,
        "by_temperature": {},
    }
    for temperature in TEMPERATURES:
        counts = specjax.generate(
            target.model, target.params, drafter, draft.params, *prompts, max_new_tokens=128,
            sampling=specjax.Sampling(temperature), controller=controllers.fixed(LONGEST),
        ).stats  # fmt: skip
        found["by_temperature"][str(temperature)] = {
            "tested": counts.tested.sum(0).tolist(),
            "accepted": counts.accepted.sum(0).tolist(),
            "tokens_per_round": round(stats.tokens_per_round(counts), 3),
        }
    compared = {"ngram": (_from_its_page(), ()), "draft_model": (drafter, draft.params)}
    found["drafters"] = {"longest": COMPARED_LONGEST}
    for name, (drafting, params) in compared.items():
        found["drafters"][name] = {}
        for temperature in (0.0, 1.0):
            counts = specjax.generate(
                target.model, target.params, drafting, params, *prompts, max_new_tokens=128,
                sampling=specjax.Sampling(temperature), controller=controllers.fixed(COMPARED_LONGEST),
            ).stats  # fmt: skip
            found["drafters"][name][str(temperature)] = round(stats.tokens_per_round(counts), 3)
    found["round"] = _one_round(target, draft, drafter, tokenizer)
    found["limit_by_batch"] = _by_batch()
    path = Path(__file__).with_name("measured.json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _by_batch() -> dict[str, Any]:
    """The most that speculation can gain, by batch and device: an 8B target, a 1B draft."""
    gains: dict[str, list[float]] = {}
    devices = {"TPU v5e": "TPU v5 lite", "H100": "NVIDIA H100 80GB HBM3", "L4": "NVIDIA L4"}
    machines = {label: (known(kind, "bfloat16"), jnp.bfloat16) for label, kind in devices.items()}
    machines["2 CPU cores"] = (Machine("EPYC", 34e9, 207e9, "benchmarks/RESULTS.md"), jnp.float32)
    target, draft = shapes.shaped("llama-8b"), shapes.shaped("llama-1b")
    for label, (machine, dtype) in machines.items():
        assert machine is not None
        whole, small = (
            jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), shape.built.abstract)
            for shape in (target, draft)
        )
        gains[label] = []
        for batch in BATCHES:
            plain = roofline.step(target.built.model, whole, batch=batch, live=LIVE)
            round_ = roofline.speculation(
                target.built.model, whole, draft.built.model, small, batch=batch, live=LIVE, draft_len=LIMIT_LONGEST
            )
            times = stats.expected_tokens_per_round(ALPHA, LIMIT_LONGEST) * roofline.seconds(plain, machine)
            gains[label].append(round(times / roofline.seconds(round_, machine), 3))
    return {"batches": BATCHES, "live": LIVE, "alpha": ALPHA, "longest": LIMIT_LONGEST, "gains": gains}


def _from_its_page() -> Any:
    page = Path(__file__).parents[1].joinpath("write-a-drafter.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    return names["ngram"]()


def _one_round(target: Any, draft: Any, drafter: Any, tokenizer: Any) -> dict[str, Any]:
    """The first greedy round that accepts some of its draft, and not all."""
    state = specjax.init(
        target.model, target.params, drafter, draft.params, *text.encode(tokenizer, [SHOWN]), max_new_tokens=64,
        controller=controllers.fixed(SHOWN_LONGEST),
    )  # fmt: skip
    for _ in range(64):
        before = jnp.copy(state.rows.tokens[0, : int(state.rows.lengths[0])])
        state, info = specjax.step(state)
        if 1 < int(info.num_accepted[0]) < SHOWN_LONGEST:
            break
    whole = jnp.concatenate([before, info.draft_tokens[0]])[None]
    size = whole.shape[1]
    empty = target.model.init_cache(target.params, 1, size), target.model.init_block(target.params, 1, size)
    logits = target.model.apply(target.params, whole, *empty).logits[0, before.shape[0] - 1 :]
    pieces = functools.partial(_pieces, tokenizer)
    return {
        "before": tokenizer.decode(before.tolist()),
        "last": pieces(before[-1:].tolist())[0],
        "drafted": pieces(info.draft_tokens[0].tolist()),
        "target_says": pieces(jnp.argmax(logits, -1).tolist()),
        "num_accepted": int(info.num_accepted[0]),
        "emitted": pieces(info.tokens[0, : int(info.num_emitted[0])].tolist()),
    }


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


if __name__ == "__main__":
    main()
