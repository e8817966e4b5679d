"""Ctrl-C for the command line.

XLA compiles for seconds without looking at signals, and crashes if an exception is raised inside it. So a separate
thread waits for the signal, and checks whether anything is being compiled.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

EXIT = 130


def watch(is_busy: Callable[[], bool]) -> None:
    """From now on Ctrl-C ends the process at once while `is_busy()`, and is a KeyboardInterrupt otherwise.

    To be called in the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # written to even while the main thread is inside XLA

    def leave_if_busy() -> None:
        if is_busy():
            leave("interrupted while loading or compiling")

    def wait() -> None:
        while os.read(reader, 1):
            leave_if_busy()

    def handle(number: int, frame: object) -> None:
        del number, frame
        leave_if_busy()  # an exception inside XLA's own calls of Python would crash it
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    threading.Thread(target=wait, name="interrupts", daemon=True).start()


def leave(message: str) -> None:
    """Ends the process without teardown, which XLA's threads may not survive."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\r\x1b[K")  # the spinner hid the cursor
    sys.stderr.write(f"specjax: {message}\n" if message else "")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT)
