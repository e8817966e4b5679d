"""What this machine has: devices, reasons, bounds."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

from specjax import environment
from specjax.environment import Device, Devices


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
