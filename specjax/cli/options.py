"""Options that several commands share, and the values of those that choose among several."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Annotated

import typer

from specjax import integers
from specjax.controllers import buckets


class Rule(enum.StrEnum):
    """The verifiers, by the names of their makers; the lossy ones do not follow the target's distribution."""

    rejection = "rejection"
    block = "block"
    coupled = "coupled"
    greedy = "greedy"
    typical_lossy = "typical-lossy"
    top_k_lossy = "top-k-lossy"


class Check(enum.StrEnum):
    """What `bench --verify` verifies."""

    exactness = "exactness"


class Part(enum.StrEnum):
    """The models that can be quantised to int8."""

    target = "target"
    draft = "draft"


def unescaped(text: str) -> str:
    r"""The text with \n, \t and \\ read as a newline, a tab and a backslash, as shells hand them over.

    >>> unescaped(r"a\nb\\n")
    'a\nb\\n'
    """
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


SPEED, EXACTNESS = "Speed", "Exactness"  # panels of bench's help


def page(text: str) -> Path:
    """The name of a file to write. Raises ValueError for an empty one and for -, which would be a file of that name."""
    if text == "":
        raise typer.BadParameter("the name is empty: give that of a file, or leave the option out.")
    if text == "-":
        raise typer.BadParameter("- is no file: pages and pictures are not written to standard output; give a name.")
    return Path(text)


def source(text: str) -> Path:
    """The name of a file to read. Raises ValueError for an empty one, and for - where PROMPT is meant."""
    if text == "":
        raise typer.BadParameter("the name is empty: give that of a file, or leave the option out.")
    if text == "-":
        raise typer.BadParameter("- is no file: as PROMPT it reads standard input, /dev/stdin is one prompt a line.")
    return Path(text)


Model = Annotated[
    str | None, typer.Option(help="Target: folder, llama2.c .bin or hub id. Alone, generate decodes plainly.")
]
Draft = Annotated[str | None, typer.Option(help="Draft model, with the target's tokenizer. Needs --model beside it.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or file, where the target's folder has none.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ... Default: as stored; float32 on CPU.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Cache = Annotated[bool, typer.Option(help="Keep compiled programs in ~/.cache/specjax.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, show_default=False, metavar="", help="Log what is loaded and traced; -vv: more."
    ),
]
Stop = Annotated[
    list[str],
    typer.Option(
        parser=unescaped,
        metavar="TEXT",
        help=r"End a text before this string; may be given several times. \n, \t and \\ are read as in Python.",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(parser=source, metavar="PATH", help="One prompt a line, instead of PROMPT; blank lines are skipped."),
]
Trace = Annotated[
    Path | None,
    typer.Option(parser=page, metavar="PATH", help="Write every round to this HTML page, with probabilities."),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        parser=page, metavar="PATH", help="Draw speed-up against K and batch into this PNG.", rich_help_panel=SPEED
    ),
]
Special = Annotated[bool, typer.Option("--special", help="Show special tokens too, as the end of a text.")]
INT32 = integers.MOST
TOKENS = 1_000_000_000  # the most of any number of tokens: with a prompt and a draft it is within int32
LONGEST_DRAFT = buckets.MOST
