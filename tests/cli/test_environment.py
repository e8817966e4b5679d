"""What this machine has: devices, reasons, bounds."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from specjax.cli.doctor import environment
from specjax.cli.doctor.environment import Device, Devices


def _device(kind, platform, memory):
    return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: memory)


def test_devices_are_counted_or_the_reason_is_told(monkeypatch):
    """Catches a traceback where a backend fails, and JAX's silence about an accelerator that it fell back from."""
    chips = [_device("TPU v5 lite", "tpu", {"bytes_limit": 17})] * 4
    assert environment.devices(lambda: chips).found == [Device("TPU v5 lite", "tpu", 4, 17)]

    busy = "ABORTED: The TPU is already in use by process with pid 176028."

    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu': NOT_FOUND (set JAX_PLATFORMS='' to choose)\nat line 3")

    assert environment.devices(fails).failure == "Unable to initialize backend 'tpu': NOT_FOUND"

    def falls_back(platform=None):
        if platform == "tpu":
            raise RuntimeError(busy)
        return [_device("cpu", "cpu", None)]

    monkeypatch.setattr(environment, "hardware", lambda: {"tpu": "/dev/accel0"})
    monkeypatch.setattr(environment, "_version", lambda name: "0.0.52" if name == "libtpu" else None)
    assert environment.devices(falls_back) == Devices("cpu", [Device("cpu", "cpu", 1, None)], None, {"tpu": busy})


def test_bounds_are_read_from_the_package(monkeypatch):
    """Catches a second list of versions that falls behind pyproject.toml, and extras that nobody asked for."""
    lines = [
        "jax>=0.8.2",
        "jax[tpu]; extra == 'tpu'",
        'huggingface_hub>=0.30; extra == "hf"',
        "ruff>=0.11; extra == 'dev'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert environment.lower_bounds() == {"jax": "0.8.2", "huggingface-hub": "0.30"}


def test_importing_looks_for_no_device(tmp_path):
    """Catches an import of specjax that starts JAX's backends, which looks for a TPU where libtpu is installed, and a
    README that no longer says how to spare one's own programs that."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_"))}
    code = "import specjax, specjax.models, specjax.text, specjax.cli.main; from jax._src import xla_bridge as b; "
    code += "assert not b.backends_are_initialized()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=env)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    readme = Path(__file__).parents[2] / "README.md"
    assert "JAX_PLATFORMS=cpu .venv/bin/python" in readme.read_text(encoding="utf-8")


def test_files_that_go_away_are_no_error(monkeypatch, tmp_path):
    """Catches a doctor that dies of another process that tidies up the folder of programs meanwhile."""
    (tmp_path / "a-cache").write_bytes(b"12345")
    (tmp_path / "gone-cache").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a-atime").write_bytes(b"1")
    assert environment._programs(tmp_path) == environment.Programs(str(tmp_path), 2, 6, True)
