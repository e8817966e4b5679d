"""What `specjax doctor` finds: the machine's facts, common problems and their cure, and how the self-check went."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from specjax.cli.doctor.environment import PLUGINS, Environment, Package
from specjax.cli.doctor.self_check import SelfCheck
from specjax.cli.error_hints import BUSY_CURE, IS_BUSY, device_cure

_NAMES = {"tpu": "a TPU", "cuda": "an NVIDIA GPU", "rocm": "an AMD GPU"}
_FIRST_DRIVER_OF_CUDA_13 = 580  # as JAX's installation guide has it

MEANING = {
    None: "none: nothing can run",
    "cpu": (
        "cpu: models run in float32 unless told otherwise, and speculation gives plain decoding's tokens exactly. "
        "A pass over several tokens costs about two passes over one, so gains are small; times say nothing of a TPU "
        "or GPU."
    ),
    "tpu": (
        "tpu: models run in the dtype they are stored in. In bfloat16 a pass over several tokens rounds differently "
        "from a pass over one, and a near-tie may fall the other way; float32 multiplies in full precision, as "
        "specjax asks for it, and nothing differs."
    ),
}
MEANING["gpu"] = MEANING["tpu"].replace("tpu:", "gpu:").replace("full precision,", "full precision, not TF32,")


class Severity(enum.StrEnum):
    """How bad."""

    error = "error"  # something does not work
    warning = "warning"  # it works, and not as it could
    note = "note"


class Problem(NamedTuple):
    """Something to know, and what to do."""

    severity: Severity
    what: str
    cure: str


class Report(NamedTuple):
    """All that was found."""

    environment: Environment
    problems: list[Problem]
    check: SelfCheck | None  # None: not run

    @property
    def is_healthy(self) -> bool:
        """Slow is healthy; wrong or unusable is not."""
        works = all(problem.severity is not Severity.error for problem in self.problems)
        return works and (self.check is None or self.check.passed)


def problems(found: Environment) -> list[Problem]:
    """What is wrong with an environment, the worst first."""
    rules = (_no_devices, _idle_hardware, _libtpu_alone, _options, _versions, _several, _programs)
    every = [problem for rule in rules for problem in rule(found)]
    return sorted(every, key=lambda problem: list(Severity).index(problem.severity))


def _no_devices(found: Environment) -> Iterator[Problem]:
    failure = found.devices.failure
    if failure is not None:
        cure = device_cure(failure, found.settings["JAX_PLATFORMS"])
        yield Problem(Severity.error, f"JAX has no device to run on: {failure}", cure)


def _idle_hardware(found: Environment) -> Iterator[Problem]:
    if found.devices.backend != "cpu":
        return
    for platform, file in found.hardware.items():
        what = f"{_NAMES[platform]} seems to be here ({file}), and JAX runs on the CPU"
        plugin = _installed(found, *PLUGINS[platform])
        asked, refused = found.settings["JAX_PLATFORMS"], found.devices.refused.get(platform)
        if plugin is None:
            yield Problem(Severity.warning, what, _install(platform))
        elif refused and IS_BUSY.search(refused):
            yield Problem(Severity.warning, f"{what}: {refused}", BUSY_CURE)
        elif asked:
            yield Problem(Severity.warning, what, f"JAX_PLATFORMS={asked} keeps JAX off it: unset it.")
        else:
            cure = f"{plugin.name} {plugin.version} is installed and did not start. Does the driver fit? "
            yield Problem(Severity.warning, f"{what}: {refused}", cure + _install(platform))


def _install(platform: str) -> str:
    if platform == "rocm":
        return "specjax has no extra for AMD: install JAX's ROCm plugin as docs.jax.dev says."
    extra = "tpu" if platform == "tpu" else _cuda_extra()
    return f"pip install -U 'specjax[{extra}]' (that is 'jax[{extra}]')."


def _cuda_extra(version_file: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        said = version_file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no driver, or nothing that may be read
        said = ""
    driver = re.search(r"\s(\d{3})\.\d+", said)
    return "cuda13" if driver and int(driver[1]) >= _FIRST_DRIVER_OF_CUDA_13 else "cuda12"


def _libtpu_alone(found: Environment) -> Iterator[Problem]:
    if _installed(found, "libtpu") and "tpu" not in found.hardware and not found.settings["JAX_PLATFORMS"]:
        yield Problem(
            Severity.note,
            "libtpu is installed and there is no TPU: your own programs look for one at their start, and complain",
            "JAX_PLATFORMS=cpu in the environment spares that (the command line does so by itself); keep libtpu for "
            "specjax compile.",
        )


def _options(found: Environment) -> Iterator[Problem]:
    settings = found.settings
    if settings["jax_enable_x64"]:
        yield Problem(
            Severity.error,
            "jax_enable_x64 is on, and specjax computes in 32 bits or fewer",
            "unset JAX_ENABLE_X64; in a program that needs it, call specjax under `with jax.enable_x64(False):`.",
        )
    if settings["jax_disable_jit"]:
        yield Problem(Severity.warning, "jit is off: everything runs operation by operation", "unset JAX_DISABLE_JIT.")
    if settings["SPECJAX_TPU_KERNELS"] == "0" and found.devices.backend == "tpu":
        yield Problem(
            Severity.note,
            "SPECJAX_TPU_KERNELS=0: attention and the cache write are left to XLA, which is slower",
            "unset it, and see whether the self-check still passes.",
        )


def _versions(found: Environment) -> Iterator[Problem]:
    for name, version, least in found.packages:
        if version is None:
            extra = "specjax" if name in ("jax", "flax", "numpy") else "specjax[cli]"
            yield Problem(Severity.warning, f"{name} is not installed", f"pip install '{extra}'.")
        elif least and _numbers(version) < _numbers(least):
            what = f"{name} {version} is older than what specjax is tested with, {least}"
            yield Problem(Severity.warning, what, f"pip install -U '{name}>={least}'.")
    jaxlib = _installed(found, "jaxlib")
    for name, extra in (("jax-cuda12-plugin", "cuda12"), ("jax-cuda13-plugin", "cuda13")):
        plugin = _installed(found, name)
        if plugin and jaxlib and plugin.version != jaxlib.version:
            what = f"{name} {plugin.version} is not of jaxlib {jaxlib.version}: JAX may pass the GPU over"
            yield Problem(Severity.warning, what, f"pip install -U 'jax[{extra}]'.")


def _several(found: Environment) -> Iterator[Problem]:
    count = sum(device.number for device in found.devices.found)
    if count > 1:
        yield Problem(
            Severity.note,
            f"{count} devices are here, and the command line uses the first",
            "specjax.sharding lays a model over a mesh of them; benchmarks/pod.py measures that.",
        )


def _programs(found: Environment) -> Iterator[Problem]:
    if found.programs.folder is None:
        yield Problem(
            Severity.warning,
            "there is no home directory to keep compiled programs in: every run compiles anew",
            "set XDG_CACHE_HOME, or HOME, to a folder that can be written to.",
        )
    elif not found.programs.is_writable:
        yield Problem(
            Severity.warning,
            f"{found.programs.folder} cannot be written to: every run compiles anew",
            "set XDG_CACHE_HOME to a folder that can.",
        )


def _installed(found: Environment, *names: str) -> Package | None:
    return next((package for package in found.packages if package.name in names and package.version), None)


def _numbers(version: str) -> list[int]:
    """The leading numbers of a version, without trailing zeros: 0.10.2rc1 is [0, 10, 2]."""
    numbers = [int(number) for number in re.match(r"\d*(?:\.\d+)*", version)[0].split(".") if number]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
