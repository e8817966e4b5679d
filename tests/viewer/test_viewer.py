"""The trace page, in a real browser: it is pointed at, scrolled, typed into and looked at by its own numbers."""

from __future__ import annotations

import re

import chromium
import hostile
import pytest
import viewer as synthetic

from specjax import viewer
from specjax.types import Status
from specjax.viewer import trace
from specjax.viewer.trace import Kind, Trace, TracedRound, TracedRow

needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on the path")
SIGNS = {
    "\n": "↵",
    " ": "·",
    "\t\t": "⇥⇥",
    "": "#8",
    "\u200b": "\u2039200B\u203a",
    "\x00\x1b[31m": "␀␛[31m",
    "👩\u200d🔬": "👩\u200d🔬",
}
# The contrast of every text with what lies under it, in the page: [ratio, class, text], the lowest first.
CONTRAST = """(() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (above, below) => {
    const [r, g, b, a] = above;
    return [...[r, g, b].map((value, index) => a * value + (1 - a) * below[index]), 1];
  };
  const under = (element) => {
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(parse(getComputedStyle(at).backgroundColor));
    return chain.reduce((below, above) => over(above, below), [255, 255, 255, 1]);
  };
  const light = (colour) => {
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.slice(0, 3).map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*:not(script, style, noscript)")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    if (!text || !element.getClientRects().length) continue;
    const ground = under(element);
    let alpha = 1;
    for (let at = element; at; at = at.parentElement) alpha *= Number(getComputedStyle(at).opacity);
    const [r, g, b, a] = parse(getComputedStyle(element).color);
    const [one, other] = [light(over([r, g, b, a * alpha], ground)), light(ground)].sort((x, y) => y - x);
    found.push([(one + 0.05) / (other + 0.05), element.tagName + "." + element.className, text.slice(0, 20)]);
  }
  return found.sort((one, other) => one[0] - other[0]);
})()"""


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser((1400, 900)) as opened:
        yield opened


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of a trace; in the end it must have asked for nothing and complained of nothing."""
    pages = []

    def open_page(*rows, **settings):
        path = tmp_path / f"trace{len(pages)}.html"
        viewer.save(Trace(list(rows), settings), path)
        pages.append((path, browser.open(path.as_uri())))
        return pages[-1][1]

    yield open_page
    for path, page in pages:
        assert page.complaints() == []
        assert page.requests() == [path.as_uri()]


def _tip(page):
    """What the tooltip says: the numbers by their names."""
    return page.evaluate(
        "tip.hidden ? null : Object.fromEntries([...tip.querySelectorAll('.probability')]"
        ".map(bar => [bar.dataset.name, bar.textContent]))"
    )


def _shown(value):
    value = float(f"{value:.6g}")  # as the page holds it
    if value in (0, 1):
        return str(int(value))
    return f"{value:.4f}" if value >= 5e-5 else re.sub(r"e-0*", "e-", f"{value:.1e}")


def _numbers(token):
    found = {"draft": token.draft_prob, "target": token.target_prob, "target, raw": token.model_prob}
    shown = {name: _shown(value) for name, value in found.items() if value is not None}
    if shown["target, raw"] == shown["target"]:
        del shown["target, raw"]
    return shown


@needs_browser
def test_pointing_and_keys_show_the_probabilities_of_the_trace(show):
    """Catches numbers of another cell, cells out of reach of the keyboard, a tooltip that stays."""
    row = synthetic.synthetic(40)
    page = show(row)
    kinds = set()
    for place, one in enumerate(row.rounds[:12], 1):
        for column, token in enumerate([*one.draft, one.target], 1):
            page.hover(f'[data-round="{place}"] [data-column="{column}"]')
            assert _tip(page) == _numbers(token), (place, column)
            assert token.kind in page.evaluate("tip.querySelector('p').textContent")
            label = page.evaluate(f"document.querySelector('[data-round=\"{place}\"]').children[{column}].ariaLabel")
            assert label.startswith(f"{token.kind} ")
            assert f"target {_numbers(token)['target']}" in label
            kinds.add(token.kind)
    assert kinds == set(Kind) - {Kind.FIRST}
    assert page.evaluate("document.querySelector('#text .here').textContent") == row.rounds[11].text
    page.move(5, 5)
    assert _tip(page) is None
    for _ in range(8):
        page.press("Tab")
        if page.evaluate("document.activeElement.dataset.column"):
            break
    assert _tip(page) == _numbers(row.start.target)
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.press(key)
    assert _tip(page) == _numbers(row.rounds[1].draft[3])
    page.press("Escape")
    assert _tip(page) is None
    page.press("End")
    assert _tip(page) == _numbers(row.rounds[-1].draft[3])
    assert page.evaluate("document.activeElement.parentElement.dataset.round") == "40"
    box, table = page.box(":focus"), page.box("#table")
    assert table["y"] < box["y"] < box["y"] + box["height"] <= table["y"] + table["height"]


@needs_browser
def test_both_schemes_can_be_read(show):
    """Catches a toggle that does nothing, a scheme that ignores the system, and text too faint for its ground."""
    page = show(synthetic.synthetic(30), hostile.row(), temperature=0.8, device="cpu")
    grounds = set()
    for system, label in (("light", "Dark"), ("dark", "Light")):
        page.prefer(system)
        assert page.evaluate("scheme.textContent") == label
        grounds.add(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        page.hover('[data-round="1"] [data-column="1"]')
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 100
        for ratio, name, content in contrasts:
            assert ratio >= (3 if name == "I." else 4.5), (system, name, content)  # I: signs for spaces beside letters
    assert len(grounds) == 2
    page.click("#scheme")
    assert page.evaluate("scheme.textContent") == "Dark"
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") in grounds
    assert page.evaluate(CONTRAST)[0][0] >= 3
    page.prefer("light")
    page.click("#scheme")
    assert page.evaluate("scheme.textContent") == "Light"


@needs_browser
def test_kinds_differ_by_more_than_colour(show):
    """Catches a kind that only its colour tells from another: line, border, slant or sign must differ."""
    page = show(synthetic.synthetic(5))
    looks = page.evaluate(
        """[...document.querySelectorAll("#legend .token")].map(token => {
             const style = getComputedStyle(token);
             return [style.borderBottomStyle, style.borderTopStyle, style.textDecorationLine, style.fontStyle,
                     getComputedStyle(token, "::before").content].join();
           })"""
    )
    assert len(looks) == len(set(looks)) == len(Kind)


@needs_browser
def test_two_thousand_rounds_keep_few_elements(show):
    """Catches every round in the document, rounds that do not appear when scrolled to, layouts without end."""
    row = synthetic.synthetic(2000)
    page = show(row)
    table = page.box("#table")
    middle = (table["x"] + 200, table["y"] + 300)
    page.hover('[data-round="5"] [data-column="1"]')
    assert _tip(page) is not None
    gone = "table.addEventListener('scroll', () => done(tip.hidden), {once: true}); table.scrollTop = 40"
    assert page.evaluate(f"new Promise(done => {{{gone}}})")  # at once, as what was pointed at moves away
    for _ in range(5):
        page.wheel(*middle, 700)
    for _ in range(2):  # the wheel's own animation
        page.settle()
    under = f"document.elementFromPoint({middle[0]}, {middle[1]})"
    seen = page.evaluate(f"Number({under}.closest('.row').dataset.round)")
    assert seen > 30
    assert page.evaluate("rows.querySelectorAll('*').length") < 900
    assert page.evaluate("rows.getBoundingClientRect().height") == 2001 * 30
    page.evaluate("table.scrollTop = 1e9")
    page.settle()
    last = "document.querySelector('[data-round=\"2000\"]')"
    assert page.evaluate(f"{last}.getBoundingClientRect().bottom <= table.getBoundingClientRect().bottom + 1")
    assert page.evaluate("rows.querySelectorAll('*').length") < 900
    cells = page.evaluate(f"[...{last}.querySelectorAll('.token')].map(token => token.textContent)")
    assert len(cells) == len(row.rounds[-1].draft) + 1
    page.call("Performance.enable")

    def layouts():
        return next(m["value"] for m in page.call("Performance.getMetrics")["metrics"] if m["name"] == "LayoutCount")

    before = layouts()
    for place in range(1986, 1996):
        page.hover(f'[data-round="{place}"] [data-column="2"]')
    assert layouts() - before <= 30  # `hover` reads the layout once itself


@needs_browser
def test_hostile_text_is_only_text(show):
    """Catches a prompt that ends the script, runs one, is taken for a place of the template, or hides itself."""
    page = show(hostile.row(), note="</script>\"'", other=hostile.TEXTS[0])
    assert page.evaluate("document.title").startswith("specjax trace: </script><script>document.title")
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("settings.textContent").count("</script>") == 3
    whole = "".join(hostile.TEXTS) + "".join(text * 2 for text in hostile.TEXTS)
    read = page.evaluate("[...document.getElementById('text').textContent].map(part => part.codePointAt(0))")
    assert read == [ord(character) for character in whole]
    for place, content in enumerate(hostile.TEXTS, 1):
        page.evaluate(f"table.scrollTop = {30 * (place - 3)}")
        page.settle()
        cell = f'[data-round="{place}"] [data-column="1"]'
        shown = page.evaluate(f"document.querySelector('{cell}').textContent")
        if content in SIGNS:
            assert shown == SIGNS[content]
        assert shown.strip()
        assert page.box(cell)["width"] > 6
        page.move(5, 5)  # the next cell lies where the last one did
        page.hover(cell)
        assert _tip(page) == {"draft": "0.5000", "target": "0.1250", "target, raw": "0.2500"}


@needs_browser
def test_another_prompt_can_be_chosen(show):
    """Catches totals, text or rounds of the prompt before, and a click on the text that leads nowhere."""
    rows = [synthetic.synthetic(30), synthetic.synthetic(50, draft_len=3, seed=1)._replace(prompt="class <b>:\n")]
    page = show(*rows, K=5)
    assert page.evaluate("document.querySelectorAll('#head > *').length") == 5 + 3
    page.evaluate("document.getElementById('prompt').focus()")
    page.press("ArrowDown")
    totals = trace.as_json(Trace(rows, {}))
    own = totals["rows"][1]["totals"]
    values = page.evaluate("[...document.querySelectorAll('#totals dd')].map(value => value.firstChild.data)")
    assert values == [
        str(own["tokens"]), "50", f"{own['tokens_per_round']:.2f}", f"{round(100 * own['acceptance_rate'])}%",
    ]  # fmt: skip
    assert f"all prompts {totals['totals']['tokens']}" in page.evaluate("totals.textContent")
    shares = page.evaluate("[...document.querySelectorAll('.position span')].map(span => span.textContent)")
    assert shares == [f"{round(100 * share)}%" for share in own["acceptance_by_position"]]
    assert page.evaluate("document.getElementById('text').textContent") == rows[1].prompt + rows[1].text
    box = page.box('[data-place="1"]')
    page.click_at(box["x"] + 2, box["y"] + 5)
    assert page.evaluate("document.activeElement.parentElement.dataset.round") == "1"
    assert page.evaluate("rows.children[1].querySelector('[data-column=\"1\"]').textContent") == page.evaluate(
        "[...rows.children].find(row => row.dataset.round == 1).children[1].textContent"
    )


@needs_browser
def test_a_trace_of_nothing_is_a_page(show):
    """Catches a script that fails where there is no row, no round, or a row that ended at its prompt."""
    show()
    page = show(TracedRow("x", TracedRound([], None, ""), [], Status.BAD_PROMPT))
    assert "nothing was done" in page.evaluate("settings.textContent")


@needs_browser
def test_a_notebook_s_picture_can_be_read_on_light_and_dark(browser, tmp_path):
    """Catches colours that only one of Colab's themes can carry."""
    found = Trace([synthetic.synthetic(12), hostile.row()], {})
    for ground, ink in (("#ffffff", "#212121"), ("#383838", "#d5d5d5"), ("#1f1f1f", "#e3e3e3"), ("#111111", "#ffffff")):
        path = tmp_path / "cell.html"
        style = f"background:{ground};color:{ink}"
        path.write_text(f"<!doctype html><meta charset=utf-8><body style='{style}'>{found._repr_html_()}</body>")
        page = browser.open(path.as_uri())
        assert page.complaints() == []
        ratio, _, content = page.evaluate(CONTRAST)[0]
        assert ratio >= 4.5, (ground, content)
        assert page.evaluate("document.scripts.length + document.styleSheets.length") == 0
        titles = page.evaluate("[...document.querySelectorAll('[title]')].map(span => span.title)")
        token = found.rows[0].rounds[0].emitted()[0]
        assert f"{token.kind}, target {token.target_prob:.4g}, target, raw {token.model_prob:.4g}" in titles[1]
