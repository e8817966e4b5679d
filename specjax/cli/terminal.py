"""Runs a command as a process: with any arguments and streams, an error becomes one sentence and an exit status."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from specjax.cli import error_hints, interrupts


def run(command: Callable[[], Any]) -> None:
    """Runs it: bad input ends with a message and status 2, Ctrl-C with status 130; a traceback is a bug of ours."""
    prepare_streams()
    try:
        sys.argv[1:] = read_arguments(sys.argv[1:])
        command()
    except KeyboardInterrupt:
        interrupts.leave("interrupted")
    except OSError as error:
        _drop_output()
        _refuse(error_hints.of_system(error))
    except UnicodeEncodeError as error:
        _refuse(error_hints.of_encoding(error))
    except (ValueError, ImportError) as error:
        _refuse(str(error))
    except (RuntimeError, AssertionError, MemoryError) as error:
        explained = error_hints.explain(error)
        if explained is None:
            raise
        _refuse(explained)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"specjax: {message}", err=True)
    raise SystemExit(2) from None


def prepare_streams() -> None:
    """Replaces closed streams: input is then empty, writing to output is an error, and writing to errors does nothing.

    A character that a stream cannot encode is written as an escape.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_Closed(os.devnull, "w"), "utf-8", write_through=True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Closed(io.FileIO):
    """Standard output where it is closed. It takes the file descriptor, so that no other file gets it."""

    def write(self, data: Any) -> NoReturn:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def read_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments as text, whatever the locale: Python stores bytes that it cannot decode as lone surrogates.

    Raises ValueError for bytes that are not UTF-8, because tokenizers, JSON and pages need UTF-8.
    """
    return [_as_text(argument) for argument in arguments]


def _as_text(argument: str) -> str:
    try:
        argument.encode("utf-8")
        return argument
    except UnicodeEncodeError:
        hidden = os.fsencode(argument)
    try:
        return hidden.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"the argument {hidden!r} is no UTF-8 text: pass text in UTF-8 (iconv converts it), and rename a file of "
            "such a name."
        ) from None


def _drop_output() -> None:
    """Drops output that cannot be written; otherwise the interpreter would try again at its end and print an error."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
