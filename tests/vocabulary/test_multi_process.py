"""A mesh over two processes that talk over loopback: the script for pods, rehearsed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from specjax import models

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/pod.py"
DRAFT = str(models.PRETRAINED / "draft")


def test_two_processes_of_four_devices(tmp_path):
    """Catches what works in one process only: host values that are no global arrays, results that lie elsewhere,
    parts of files that another process reads. Tokens are those of one device; float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, str(SCRIPT), "--simulate", "4", "--coordinator", address, "--processes", "2", "--data", "2",
        "--model-axis", "4", "--check", "--repeats", "1", "--max-new-tokens", "12", "--draft-len", "3", "--batch", "4",
        "--model", DRAFT, "--draft", DRAFT, "--out", str(tmp_path / "pod.json"),
    ]  # fmt: skip
    flags = "--xla_backend_optimization_level=0"
    running = [
        subprocess.Popen(
            [*command, "--process", str(index)],
            env={**os.environ, "XLA_FLAGS": flags},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]
    said = []
    try:
        said = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    found = json.loads((tmp_path / "pod.json").read_text())
    assert (found["devices"], found["processes"], found["mesh"]) == (8, 2, {"data": 2, "model": 4})
    assert found["agrees_with_one_device"] is True
    speculative = found["results"][1]
    assert speculative["same_tokens"]
    assert speculative["acceptance"] == 1.0  # the draft model drafts for itself
    assert speculative["passes"] < found["results"][0]["passes"]
    assert "one device gives the same tokens" in said[0]
    assert "tokens/s" not in said[1]  # one host reports
