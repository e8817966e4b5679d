"""Errors of JAX that a user can fix, and how."""

from __future__ import annotations

import re

from specjax.cli.doctor import environment

IS_BUSY = re.compile(r"already in use|resource busy|lockfile", re.IGNORECASE)

IS_FULL = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)  # CPUs say the latter


def explain(error: BaseException) -> str | None:
    """What happened and what to do; None if this is not known, so that a traceback says more."""
    said = environment.reason(error)
    if isinstance(error, MemoryError) or IS_FULL.search(str(error)):
        whose = "this machine" if isinstance(error, MemoryError) else "the device"
        return (
            f"{whose} is out of memory ({said}). Fewer rows at once (--batch), fewer new tokens, a shorter draft "
            "(--draft-len) or --dtype bfloat16 need less."
        )
    if "home directory" in str(error):  # Path.home(), where HOME is not set and the user has no entry in passwd
        return "there is no home directory here: set HOME to a folder that can be written to."
    failure = environment.devices().failure
    if failure is None:
        return None
    cure = device_cure(failure, environment.settings()["JAX_PLATFORMS"])
    return f"JAX has no device to run on ({failure}). {cure} `specjax doctor` says what is here."


def of_system(error: OSError) -> str:
    """What the operating system refused, and for which file, without the numbers and quotes of Python's own text."""
    if error.strerror is None or error.errno is None:  # raised by specjax, with a sentence of its own
        return str(error)
    if error.filename is None:
        return f"standard output, or a file that was asked for, cannot be written or read: {error.strerror}."
    return f"{error.filename}: {error.strerror}."


def of_encoding(error: UnicodeEncodeError) -> str:
    """Which file name this locale cannot encode."""
    name = ascii(error.object)
    return (
        f"{name} cannot be the name of a file here: this locale knows {error.encoding} only. Set PYTHONUTF8=1, or "
        "LC_ALL=C.UTF-8."
    )


def device_cure(failure: str, asked: str | None) -> str:
    """What to do if JAX does not start; `asked` is JAX_PLATFORMS."""
    if IS_BUSY.search(failure):
        return BUSY_CURE
    if asked:
        return f"JAX_PLATFORMS={asked} asks for what is not here: unset it, or set it to cpu."
    return "JAX's own account: python -c 'import jax; jax.devices()'."


BUSY_CURE = (
    "Another process holds the TPU, and only one can: end it (sudo lsof -w /dev/accel* /dev/vfio/* names it; notebooks "
    "keep theirs until their kernel is shut down)."
)
