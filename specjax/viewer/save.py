"""Pages as files: checked before anything is generated, and never half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from specjax.viewer.page import page
from specjax.viewer.trace import Trace


def save(trace: Trace, path: str | Path) -> None:
    """Writes the page of `trace`. Raises what `writer` raises."""
    writer(path)(trace)


def writer(path: str | Path) -> Callable[[Trace], None]:
    """A function that writes the page of a trace to `path`, as often as it is called.

    The page is written to another file, which then replaces the old one: a failure leaves the old page whole.

    Raises:
      ValueError: nothing can be written there. It is raised here, and not when the returned function is called.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path must be the name of a file, such as 'trace.html', got {path!r}.")
    path = Path(path)
    try:
        path = path.resolve()  # a link stays a link
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file, such as {path / 'trace.html'}.")
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}.")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} cannot be written: it is not a file.")
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from error

    def write(trace: Trace) -> None:
        try:
            beside.write_text(page(trace), encoding="utf-8", newline="\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    return write
