"""Records docs/images/*.svg: what the commands print on a terminal, colours included. Nothing is made up.

    python docs/terminal.py

Each command runs twice under a pseudo terminal, so that its programs are compiled when it is recorded.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

FOLDER = Path(__file__).parent / "images"
COMMANDS = {
    "generate": 'specjax generate "def merge_sort(items):"',
    "doctor": "specjax doctor",
}
WIDTH = 96
THEME = TerminalTheme(
    (250, 250, 250),
    (36, 41, 47),
    [(36, 41, 47), (207, 34, 46), (17, 99, 41), (154, 103, 0), (9, 105, 218), (130, 80, 223), (27, 124, 131),
     (110, 119, 129)],
)  # fmt: skip
_NOT_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]|\x1b[=>]")  # moves of the cursor; colours end in m


def run(command: str) -> str:
    """What a terminal would get, line ends made plain."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    # TTY_INTERACTIVE=0 asks rich for no spinner; it would be gone at the end anyway.
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "TTY_INTERACTIVE": "0"}
    words = [sys.executable, "-m", "specjax.cli", *shlex.split(command)[1:]]
    with subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        parts = []
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux says so when the last writer is gone
                break
            if not part:
                break
            parts.append(part)
    os.close(master)
    if process.returncode:
        raise SystemExit(f"{command}: status {process.returncode}\n{b''.join(parts).decode()}")
    return _NOT_COLOUR.sub("", b"".join(parts).decode()).replace("\r\n", "\n").replace("\r", "")


def main() -> None:
    """Writes one picture for each command."""
    FOLDER.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        run(command)
        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        console.print(Text.assemble(("$ ", "dim"), (command, "bold")))
        console.print(Text.from_ansi(run(command)))
        svg = console.export_svg(title=f"specjax {name}", theme=THEME, unique_id=f"specjax-{name}")
        (FOLDER / f"{name}.svg").write_text(re.sub(r"[ \t]+\n", "\n", svg), encoding="utf-8")


if __name__ == "__main__":
    main()
