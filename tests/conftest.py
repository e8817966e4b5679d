"""Environment and strictness for every test; set before JAX is imported."""

from __future__ import annotations

import gc
import os
import pathlib

import xla_options

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite is hundreds of small programs, each run once: compiled this way they take half to a quarter of the time. The
# HLO is the same. `XLA_FLAGS= pytest` runs what users run, as .ci/run does for the pair.
os.environ.setdefault("XLA_FLAGS", xla_options.FLAGS)
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # simulated, for meshes

import pytest  # noqa: E402

collect_ignore = ["adapters/third_party"]  # scripts for other environments

_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="session")
def _flags_for_this_process_only():
    """libtpu dies of flags for CPUs, and the CLI in a process of its own runs as it does for users."""
    jax.devices()  # reads them, once
    os.environ.pop("XLA_FLAGS", None)


@pytest.fixture(autouse=True)
def _room_for_programs():
    """A program on CPU takes up to 1,000 memory maps, and Linux allows a process 65,530: past that, XLA crashes."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def fresh_programs():
    """A bug that is put in on purpose must be compiled in, and must not outlive its test."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """Neighbouring tests go to one worker, which has their programs and fixtures; the other steals what is left."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"
