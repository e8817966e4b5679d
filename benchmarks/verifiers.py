"""How much of a draft each verifier keeps: the shipped pair, real prompts, temperature 1, one distribution of drafts.

    python benchmarks/verifiers.py --draft-len 3 --draft-len 5 --draft-len 8

Every seed is a run over all prompts; tokens a round are over all of them, the range over seeds. Lossy rules are shown
too: what they gain is paid with another distribution.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from prompts import code_prompts
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import specjax
from specjax import models, stats, verify

RULES = {
    "rejection": verify.rejection(),
    "block": verify.block(),
    "coupled": verify.coupled(),
    "typical_lossy": verify.typical_lossy(),
    "top_k_lossy": verify.top_k_lossy(),
}


def main(
    draft_len: Annotated[list[int], typer.Option(help="K; may be given several times")] = [3, 5, 8],  # noqa: B006
    temperature: float = 1.0,
    num_prompts: int = 40,
    max_new_tokens: int = 128,
    seeds: Annotated[int, typer.Option(help="runs over all prompts")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="where to write the numbers")] = None,
) -> None:
    """Prints a table of tokens a round and acceptance, per verifier and K."""
    target, draft = (models.load(models.PRETRAINED / name, dtype=jnp.float32) for name in ("target", "draft"))
    prompts = code_prompts(Tokenizer.from_file(str(models.PRETRAINED / "target/tokenizer.json")), num_prompts)
    drafter = specjax.drafters.draft_model(draft.model)
    table = Table("verifier", "K", "tokens/round", "range over seeds", "over rejection", "acceptance")
    found = []
    for length in draft_len:
        reference = None
        for name, rule in RULES.items():
            runs = []
            for seed in range(seeds):
                out = specjax.generate(
                    target.model, target.params, drafter, draft.params, *prompts, key=jax.random.key(seed),
                    max_new_tokens=max_new_tokens, sampling=specjax.Sampling(temperature), verifier=rule,
                    controller=specjax.controllers.fixed(length),
                )  # fmt: skip
                runs.append((stats.tokens_per_round(out.stats), stats.acceptance_rate(out.stats)))
            rounds, accepted = np.array(runs).T
            reference = reference or rounds.mean()
            found.append({"verifier": name, "draft_len": length, "tokens_per_round": rounds.tolist()})
            table.add_row(
                name, str(length), f"{rounds.mean():.3f}", f"{rounds.min():.2f} to {rounds.max():.2f}",
                f"{rounds.mean() / reference:.3f}", f"{accepted.mean():.0%}",
            )  # fmt: skip
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
