"""The pictures of the trace viewer in docs/images, from a real run of the shipped pair.

    python benchmarks/screenshots.py

Fonts are those of the machine that runs it.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import typer
from chromium import Browser

IMAGES = Path(__file__).parent.parent / "docs" / "images"
POINTED_AT = '[data-round="9"] [data-column="3"]'
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def main(prompt: str = "def merge_sort(items):", temperature: float = 0.8, seed: int = 1) -> None:
    """Writes trace-light.png, and trace-dark.png with a token pointed at."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser((1280, 880)) as browser:
        path = Path(folder, "trace.html")
        command = [sys.executable, "-m", "specjax.cli", "generate", prompt, "--trace", str(path)]
        subprocess.run(
            [*command, "--temperature", str(temperature), "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL
        )
        page = browser.open(path.as_uri())
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            if scheme == "dark":
                page.hover(POINTED_AT)
            picture = IMAGES / f"trace-{scheme}.png"
            page.screenshot(picture)
            picture.write_bytes(smaller(picture.read_bytes()))
            print(f"{picture}: {picture.stat().st_size // 1024} KiB")


def smaller(png: bytes) -> bytes:
    """An RGB picture with a palette in its place: the 256 most frequent colours, the others the nearest of them."""
    pixels = _pixels(png)
    colours, index, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    kept = np.argsort(-counts, kind="stable")[:256]
    distance = ((colours[:, None].astype(np.int32) - colours[kept][None]) ** 2).sum(-1)
    rows = distance.argmin(-1)[index.reshape(-1)].astype(np.uint8).reshape(pixels.shape[:2])
    height, width = rows.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1)  # filter 0: as they are
    return _SIGNATURE + b"".join(
        [
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", colours[kept].tobytes()),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _pixels(png: bytes) -> np.ndarray:
    """[height, width, 3] uint8 of an 8-bit RGB or RGBA picture, not interlaced; transparency is dropped."""
    parts, place = {}, len(_SIGNATURE)
    while place < len(png):
        size, kind = struct.unpack(">I4s", png[place : place + 8])
        parts.setdefault(kind, []).append(png[place + 8 : place + 8 + size])
        place += size + 12
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", parts[b"IHDR"][0])
    if depth != 8 or colour not in (2, 6) or interlace:
        raise ValueError("expected an 8-bit RGB or RGBA picture that is not interlaced.")
    channels = 3 if colour == 2 else 4
    lines = np.frombuffer(zlib.decompress(b"".join(parts[b"IDAT"])), np.uint8).reshape(height, 1 + width * channels)
    above = np.zeros((width, channels), np.int32)
    found = np.empty((height, width, channels), np.uint8)
    for row, line in enumerate(lines):
        above = _unfiltered(line[0], line[1:].reshape(width, channels).astype(np.int32), above)
        found[row] = above
    return found[..., :3]


def _unfiltered(kind: int, line: np.ndarray, above: np.ndarray) -> np.ndarray:
    """One line of pixels, by the PNG specification's filters."""
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, 0) % 256
    if kind == 2:
        return (line + above) % 256
    done, left, corner = np.empty_like(line), np.zeros_like(line[0]), np.zeros_like(line[0])
    for place in range(len(line)):
        up = above[place]
        if kind == 3:
            guess = (left + up) // 2
        else:
            base = left + up - corner
            far = np.abs([base - left, base - up, base - corner])
            guess = np.where((far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner))
        left = done[place] = (line[place] + guess) % 256
        corner = up
    return done


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


if __name__ == "__main__":
    typer.run(main)
