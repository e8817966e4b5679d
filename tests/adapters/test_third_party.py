"""Real modules from PyPI, as installed, each family in an environment of its own, since their pins clash with ours.

    pytest -m third_party -s tests/adapters/test_third_party.py

makes the environments (gigabytes; kept in .pytest_cache), runs the scripts in tests/adapters/third_party there, and
prints a line for every module: the strategy, the versions. Off by default; results are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = {
    # Beside TensorFlow's protobuf, which gemma pulls in, sentencepiece 0.2.1 and later do not load.
    "gemma": (["gemma", "sentencepiece<0.2.1"], {"gemma Gemma 2": "at-end", "gemma Gemma 3": "at-end"}),
    # Through the shells of docs/adapters.md, which have no cache unless they are given one.
    "equinox": (["equinox"], {"equinox transformer": "uncached"}),
    "keras_hub": (
        ["keras-hub"],
        {"keras-hub Llama": "uncached", "keras-hub Llama in its own cache": "row-by-row"},
    ),
    "tunix": (
        ["google-tunix"],
        {
            "google-tunix Llama3": "at-end",
            "google-tunix Qwen2": "at-end",
            "google-tunix Qwen3": "at-end",
            # Its window counts slots of the cache, so a round may stand nowhere but in its place.
            "google-tunix Gemma 2 (local and global layers)": "row-by-row",
            # Its windows take a pass over several tokens for the beginning of the text.
            "google-tunix Gemma 3": "uncached",
        },
    ),
}


def _environment(folder: Path, packages: list[str]) -> Path:
    """A Python with these packages beside the jax and flax that run here; made once."""
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        uv = [sys.executable, "-m", "uv"]
        ours = [f"{name}=={version(name)}" for name in ("jax", "flax")]
        subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(python), *packages, *ours], check=True)
        done.touch()
    return python


@pytest.mark.third_party
@pytest.mark.parametrize("family", FAMILIES)
def test_third_party_modules(family, request):
    """Catches an adapter that only knows modules written for it: greedy text equal to the module's own uncached passes,
    sampled text by its distribution, other parameters without a new program, the contract of a Model."""
    pytest.importorskip("uv", reason="pip install uv")
    packages, expected = FAMILIES[family]
    python = _environment(request.config.cache.mkdir(f"third-party-{family}"), packages)
    run = subprocess.run(
        [python, ROOT / "tests" / "adapters" / "third_party" / f"{family}_modules.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    sys.stdout.write("\n".join(["", *lines, ""]))
    assert run.returncode == 0, run.stderr[-3000:]
    assert {found["module"]: found["strategy"] for found in map(json.loads, lines)} == expected
