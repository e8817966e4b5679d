"""Errors of JAX's own that a user can do something about, and what."""

from __future__ import annotations

import re

from specjax import environment

IS_BUSY = re.compile(r"already in use|resource busy|lockfile", re.IGNORECASE)


def explain(error: BaseException) -> str | None:
    """What happened and what to do, or None where that is not known and a traceback says more."""
    said = environment.reason(error)
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"the device is out of memory ({said}). Fewer rows at once (--batch), fewer new tokens or --dtype bfloat16 "
            "need less."
        )
    failure = environment.devices().failure
    if failure is None:
        return None
    cure = device_cure(failure, environment.settings()["JAX_PLATFORMS"])
    return f"JAX has no device to run on ({failure}). {cure} `specjax doctor` says what is here."


def device_cure(failure: str, asked: str | None) -> str:
    """What to do where JAX does not start; `asked` is JAX_PLATFORMS."""
    if IS_BUSY.search(failure):
        return BUSY_CURE
    if asked:
        return f"JAX_PLATFORMS={asked} asks for what is not here: unset it, or set it to cpu."
    return "JAX's own account: python -c 'import jax; jax.devices()'."


BUSY_CURE = (
    "Another process holds the TPU, and only one can: end it (sudo lsof -w /dev/accel* /dev/vfio/* names it; notebooks "
    "keep theirs until their kernel is shut down)."
)
