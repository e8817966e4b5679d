"""How smooth the trace viewer is: a page of many rounds, scrolled and pointed at in headless Chromium.

    python benchmarks/viewer.py --rounds 2000
    python benchmarks/viewer.py --rounds 2000 --compare     # beside pages that keep every round in the document

Frame times are between two animation frames while every frame scrolls on; work is what the main thread did meanwhile,
by the browser's own counters. Headless without a GPU: drawing is on the CPU too.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from chromium import Browser, Page
from rich.console import Console
from rich.table import Table

from specjax import viewer
from specjax.types import Status
from specjax.viewer.trace import Kind, Token, Trace, TracedRound, TracedRow

WORDS = (
    " the", " self", ".", "config", " =", "\n", "    ", "        ", " num", "_", "labels", "(", "):", " return", "\t",
    " naïve", "✓", "🙂", " <b>", " &amp;", "tokenization", "\n\n",
)  # fmt: skip
# In the document: rounds in sight, as the page is made; all of them; all, those out of sight skipped by the browser.
PAGES = {
    "rounds in sight": (),
    "all rounds": (("const SPARE = 12", "const SPARE = 1e9"),),
    "all, content-visibility": (
        ("const SPARE = 12", "const SPARE = 1e9"),
        (".row { position", ".row { content-visibility: auto; position"),
    ),
}
_SCROLL = """
(async (steps, by) => {
  const table = document.getElementById("table"), times = [];
  const frame = () => new Promise(requestAnimationFrame);
  let before = await frame();
  for (let step = 0; step < steps; step++) {
    table.scrollTop += by;
    const now = await frame();
    times.push(now - before);
    before = now;
  }
  return times;
})"""


def synthetic(num_rounds: int, draft_len: int = 5, seed: int = 0) -> TracedRow:
    """A row of random rounds: words, kinds and probabilities as they might be."""
    draw = random.Random(seed)

    def token(kind: Kind, drafted: bool) -> Token:
        word = draw.randrange(len(WORDS))
        return Token(word, WORDS[word], kind, draw.random(), draw.random(), draw.random() if drafted else None)

    rounds = []
    for _ in range(num_rounds):
        kept = min(int(draw.expovariate(0.4)), draft_len)
        missed = [Kind.REJECTED, *[Kind.UNUSED] * draft_len][: draft_len - kept]
        draft = [token(kind, drafted=True) for kind in [Kind.ACCEPTED] * kept + missed]
        last = token(Kind.CORRECTED if missed else Kind.BONUS, drafted=False)
        rounds.append(TracedRound(draft, last, "".join(one.text for one in [*draft[:kept], last])))
    first = token(Kind.FIRST, drafted=False)
    return TracedRow("def main():", TracedRound([], first, first.text), rounds, Status.LENGTH)


def main(
    rounds: int = 2000,
    draft_len: int = 5,
    steps: Annotated[int, typer.Option(help="frames that scroll, or cells that are pointed at")] = 240,
    pixels: Annotated[int, typer.Option(help="scrolled per frame")] = 200,
    compare: bool = False,
) -> None:
    """Prints load time, elements, frame times and work per frame."""
    html = viewer.page(Trace([synthetic(rounds, draft_len)], {"made": "for a measurement"}))
    chosen = PAGES if compare else dict(list(PAGES.items())[:1])
    found = {name: _measure(_changed(html, changes), steps, pixels) for name, changes in chosen.items()}
    table = Table("", *found, title=f"{rounds} rounds, K = {draft_len}, {len(html) / 1e6:.2f} MB")
    for line in next(iter(found.values())):
        table.add_row(line, *(values[line] for values in found.values()))
    Console().print(table)


def _changed(html: str, changes: tuple[tuple[str, str], ...]) -> str:
    for old, new in changes:
        assert old in html, old
        html = html.replace(old, new)
    return html


def _measure(html: str, steps: int, pixels: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder, Browser((1400, 900)) as browser:
        path = Path(folder, "trace.html")
        path.write_text(html, encoding="utf-8")
        began = time.perf_counter()
        page = browser.open(path.as_uri())
        loaded = time.perf_counter() - began
        page.call("Performance.enable")
        times, scrolling = _during(page, lambda: page.evaluate(f"{_SCROLL}({steps}, {pixels})"))
        page.evaluate("document.getElementById('table').scrollTop = 0")
        page.settle()
        _, pointing = _during(page, lambda: _point(page, steps))
        elements = page.evaluate("document.getElementsByTagName('*').length")
    times.sort()
    return {
        "loaded and drawn": f"{1e3 * loaded:.0f} ms",
        "elements": str(elements),
        "frame, median": f"{statistics.median(times):.1f} ms",
        "frame, 95th of 100": f"{times[int(0.95 * len(times))]:.1f} ms",
        "frame, longest": f"{times[-1]:.1f} ms",
        "work per frame of scrolling": _work(scrolling, steps),
        "  script": _work(scrolling, steps, "Script"),
        "  style": _work(scrolling, steps, "RecalcStyle"),
        "  layout": _work(scrolling, steps, "Layout"),
        "work per cell pointed at": _work(pointing, steps),
        "  script, style, layout": ", ".join(_work(pointing, steps, of) for of in ("Script", "RecalcStyle", "Layout")),
        "layouts per cell pointed at": f"{pointing['LayoutCount'] / steps:.1f}",
    }


def _during(page: Page, run) -> tuple[list[float], dict[str, float]]:
    before = _counters(page)
    result = run()
    after = _counters(page)
    return result, {name: after[name] - before[name] for name in after}


def _counters(page: Page) -> dict[str, float]:
    return {entry["name"]: entry["value"] for entry in page.call("Performance.getMetrics")["metrics"]}


def _point(page: Page, steps: int) -> None:
    boxes = page.evaluate(
        "[...document.querySelectorAll('#rows .token')].map(cell => cell.getBoundingClientRect().toJSON())"
        ".filter(box => box.top > 300 && box.bottom < 850)"
    )
    for step in range(steps):
        box = boxes[step % len(boxes)]
        position = {"x": box["x"] + 3, "y": box["y"] + 3}
        page.call("Input.dispatchMouseEvent", type="mouseMoved", **position)


def _work(counters: dict[str, float], steps: int, of: str = "Task") -> str:
    return f"{1e3 * counters[f'{of}Duration'] / steps:.2f} ms"


if __name__ == "__main__":
    typer.run(main)
