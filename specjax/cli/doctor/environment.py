"""What this machine has: packages, processor, devices, settings, kept programs. Facts; problems.py judges them."""

from __future__ import annotations

import glob
import importlib.metadata
import logging
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import specjax

_log = logging.getLogger(__name__)
_PACKAGES = (
    "jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin",
    "tokenizers", "safetensors", "huggingface-hub", "transformers", "typer", "rich",
)  # fmt: skip
# What a driver leaves in /dev, by the platform that JAX would call it.
_HARDWARE = {
    "tpu": ("/dev/accel*", "/dev/vfio/[0-9]*"),
    "cuda": ("/dev/nvidia[0-9]*",),
    "rocm": ("/dev/kfd",),
}
PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "rocm": ("jax-rocm7-plugin",)}
_OPTIONS = (
    "jax_compilation_cache_dir", "jax_default_matmul_precision", "jax_enable_x64", "jax_disable_jit", "jax_debug_nans",
)  # fmt: skip
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "SPECJAX_TPU_KERNELS")


class Package(NamedTuple):
    """One that is installed, or that specjax needs."""

    name: str
    version: str | None  # None: not installed
    least: str | None  # specjax's lower bound


class Host(NamedTuple):
    """The machine around the devices."""

    system: str
    python: str
    processor: str
    cores: int  # that this process may use
    memory: int | None  # bytes that this process may use; None where the system does not say


class Device(NamedTuple):
    """Devices of one kind."""

    kind: str
    platform: str
    number: int
    memory: int | None  # bytes that JAX may use on each; None where the backend does not say


class Devices(NamedTuple):
    """What JAX found."""

    backend: str | None
    found: list[Device]
    failure: str | None  # why there are none
    refused: dict[str, str]  # platforms whose hardware and plugin are here and that did not start: why not


class Programs(NamedTuple):
    """The command line's folder of compiled programs."""

    folder: str | None  # None: there is no home directory
    files: int
    size: int  # bytes
    is_writable: bool


class Environment(NamedTuple):
    """Everything together."""

    version: str  # of specjax
    folder: str  # that it was imported from
    packages: list[Package]
    host: Host
    hardware: dict[str, str]  # platform to the first device file that speaks for it
    devices: Devices
    settings: dict[str, str | None]  # JAX's options and the environment's variables; None is not set
    programs: Programs


def look() -> Environment:
    """Collects all of it; starts JAX's backend, which takes seconds on some machines."""
    before = settings()  # the next line changes one
    quiet_platform()
    return Environment(
        version=specjax.__version__,
        folder=str(Path(specjax.__file__).parent),
        packages=packages(),
        host=_host(),
        hardware=hardware(),
        devices=devices(),
        settings=before,
        programs=_programs(cache_folder()),
    )


def packages() -> list[Package]:
    """What matters to specjax, where it is installed, and everything that specjax says it needs."""
    bounds = lower_bounds()
    names = [*_PACKAGES, *(name for name in bounds if name not in _PACKAGES)]
    found = [Package(name, _version(name), bounds.get(name)) for name in names]
    return [package for package in found if package.version is not None or package.least is not None]


def lower_bounds() -> dict[str, str]:
    """Least versions by package: of what specjax always needs, and of what reading models and the command line need."""
    try:
        requirements = importlib.metadata.requires("specjax") or []
    except importlib.metadata.PackageNotFoundError:  # run from a clone that was not installed
        return {}
    bounds = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", marker)
        parts = re.match(r"\s*([\w.-]+)(?:\[[^\]]*\])?\s*>=\s*([\d.]+)", requirement)
        if parts and (extra is None or extra[1] in ("hf", "cli")):
            bounds[parts[1].replace("_", "-").lower()] = parts[2]
    return bounds


def hardware() -> dict[str, str]:
    """Accelerators that this machine seems to have, whether JAX can use them or not: platform to a device file."""
    seen = {name: [path for pattern in each for path in glob.glob(pattern)] for name, each in _HARDWARE.items()}
    return {name: min(paths) for name, paths in seen.items() if paths}


def devices(list_devices: Callable[..., list[Any]] = jax.devices) -> Devices:
    """What JAX found, or why it found nothing. `list_devices` is `jax.devices`."""
    try:
        found = list_devices()
    except Exception as error:  # whatever a backend throws is what a doctor is for
        return Devices(None, [], reason(error), {})
    kinds = dict.fromkeys(device.device_kind for device in found)
    alike = [[device for device in found if device.device_kind == kind] for kind in kinds]
    kept = [Device(same[0].device_kind, same[0].platform, len(same), _memory(same[0])) for same in alike]
    backend = found[0].platform
    return Devices(backend, kept, None, _refused(list_devices) if backend == "cpu" else {})


def _refused(list_devices: Callable[..., list[Any]]) -> dict[str, str]:
    """JAX falls back to the CPU without a word; asked for the platform by name, it says why."""
    refused = {}
    for name in hardware():
        if any(_version(plugin) for plugin in PLUGINS[name]):
            try:
                list_devices(name)
            except Exception as error:
                refused[name] = reason(error)
    return refused


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = re.sub(r"\s*\(set JAX_PLATFORMS='' to [^)]*\)", "", lines[0]) if lines else ""
    return said or f"JAX gives no reason, a bare {type(error).__name__}"


def settings(variables: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """JAX's options that matter here, and the variables that JAX and specjax read."""
    options = {"JAX_PLATFORMS": jax.config.values["jax_platforms"]}  # the variable's name is the better known one
    options |= {name: jax.config.values.get(name) for name in _OPTIONS}
    given = {name: None if value in (None, "", False) else str(value) for name, value in options.items()}
    return {**given, **{name: variables.get(name) or None for name in _VARIABLES}}


def quiet_platform() -> None:
    """With libtpu installed and no accelerator at hand, JAX looks for a TPU and prints its disappointment."""
    if not hardware() and not jax.config.values["jax_platforms"] and _version("libtpu") is not None:
        jax.config.update("jax_platforms", "cpu")


def cache_folder() -> Path | None:
    """Where the command line keeps compiled programs; None where there is no home directory, as in some containers."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "specjax" / "xla"
    except RuntimeError:  # HOME is not set and passwd does not know the user
        return None


def usable_cache_folder() -> Path | None:
    """That folder, made, if it can be written to; what is kept there saves time, and nothing depends on it."""
    folder = cache_folder()
    try:
        if folder is not None and _is_text(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    except OSError as error:
        _log.info("compiled programs are not kept: %s", error)
    return None


def keep_programs() -> None:
    """From now on compiled programs are kept there, unless the user has a folder of their own for them."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = usable_cache_folder()
        if folder is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _host() -> Host:
    return Host(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=_processor(),
        cores=_cores(),
        memory=_host_memory(),
    )


def _processor() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()


def _cores() -> int:
    """Containers allow fewer than there are: by affinity, or by a share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return max(1, min(allowed, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else allowed


def _host_memory() -> int | None:
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None
    limit = _read("/sys/fs/cgroup/memory.max")
    return min(installed, int(limit)) if limit.isdigit() else installed


def _memory(device: Any) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # backends without such counts say so in many ways
        return None


def _programs(folder: Path | None) -> Programs:
    if folder is None:
        return Programs(None, 0, 0, False)
    sizes = [_size(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names]
    kept = [size for name, size in sizes if not name.endswith("-atime")]
    above = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path())
    writable = _is_text(folder) and os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK)
    return Programs(str(folder), len(kept), sum(size for _, size in sizes), writable)


def _is_text(folder: Path) -> bool:
    """JAX takes no other names of folders."""
    return str(folder).encode("utf-8", "ignore").decode("utf-8") == str(folder)


def _size(path: str) -> tuple[str, int]:
    """A file and its bytes; 0 where another process has just removed it, or nobody may ask."""
    try:
        return path, os.stat(path).st_size
    except OSError:
        return path, 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # not on this system, or not for this user
        return ""
