"""A command as a process runs it: whatever arguments and streams it is given, an error is a sentence and a status."""

from __future__ import annotations

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
        check_arguments(sys.argv[1:])
        command()
    except KeyboardInterrupt:
        interrupts.leave("interrupted")
    except OSError as error:
        _drop_output()
        _refuse(error_hints.of_system(error))
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
    """A closed stream becomes an empty one, and a character that a stream's encoding lacks is written as an escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises ValueError for an argument that is not text: tokenizers, JSON and pages hold nothing else."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"the argument {os.fsencode(argument)!r} is no UTF-8 text: pass text in UTF-8 (iconv converts it), and "
                "rename a file of such a name."
            ) from None


def _drop_output() -> None:
    """Drops what cannot be written: the interpreter would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
