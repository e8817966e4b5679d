"""`specjax generate --trace`: the page as a file, whatever becomes of the run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import hostile
import pytest

from specjax import viewer
from specjax.viewer import trace
from specjax.viewer.trace import Trace


def _page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>', text, re.DOTALL)[1])


def test_a_page_holds_the_trace_as_json():
    """Catches data lost on its way into the page, and "<" that could end its element."""
    given = Trace([hostile.row()], {"temperature": 1 / 3, "none": None})
    html = viewer.page(given)
    html.encode()
    assert html.count("</script>") == 2
    assert "{{style}}" not in html
    found = json.loads(re.search(r'id="trace">(.*?)</script>', html, re.DOTALL)[1])
    wanted = trace.as_json(given)
    assert found["settings"]["temperature"] == pytest.approx(1 / 3, rel=1e-5)
    assert found["rows"] == json.loads(json.dumps(wanted["rows"]))


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Catches half-written pages, leftovers, links replaced by files, and errors that come only at the end."""
    given = Trace([hostile.row()], {})
    path = tmp_path / "trace.html"
    link = tmp_path / "link.html"
    link.symlink_to(path)
    viewer.save(given, str(link))
    assert link.is_symlink()
    whole = path.read_text(encoding="utf-8")
    assert whole == viewer.page(given)
    write = viewer.writer(path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(Trace([], {}))
    assert path.read_text(encoding="utf-8") == whole
    assert sorted(tmp_path.iterdir()) == [link, path]
    for wrong, message in (
        (tmp_path, "is a folder"), (tmp_path / "no" / "t.html", "there is no folder"), ("/dev/null", "not a file"),
        (path / "t.html", "there is no folder"), (tmp_path / ("x" * 300), "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            viewer.writer(wrong)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`specjax generate`, with one compilation cache for the module."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    return lambda *args: subprocess.Popen(
        [sys.executable, "-m", "specjax.cli", "generate", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def test_the_command_writes_what_it_says(command, tmp_path):
    """Catches a page of other tokens than those reported, settings left out, batches mixed up."""
    (tmp_path / "prompts.txt").write_text("import numpy\nclass Foo:\n# naïve ✓")
    path = tmp_path / "trace.html"
    process = command(
        "--prompt-file", tmp_path / "prompts.txt", "--batch", 2, "--max-new-tokens", 12, "--temperature", 0.8,
        "--seed", 5, "--draft-len", 3, "--verifier", "block", "--json", "--trace", path,
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    reported, found = json.loads(out), _page_data(path)
    for row, result in zip(found["rows"], reported["results"], strict=True):
        assert (row["prompt"], row["text"]) == (result["prompt"], result["text"])
        assert row["status"] == result["status"]
        steps = [row["start"], *row["rounds"]]
        tokens = [token for one in steps for token in (*one["draft"], one["target"]) if token]
        emitted = [token["id"] for token in tokens if token["kind"] not in ("rejected", "unused")]
        assert emitted == result["tokens"]
    assert found["totals"]["tokens_per_round"] == pytest.approx(reported["tokens_per_round"], rel=1e-5)
    assert found["totals"]["acceptance_rate"] == pytest.approx(reported["acceptance_rate"], rel=1e-5)
    settings = found["settings"]
    assert (settings["K"], settings["temperature"], settings["verifier"], settings["seed"]) == (3, 0.8, "block", 5)
    assert settings["device"] == reported["device"]
    if reported["busy"]:  # other work on this machine
        assert "no verdict" in settings["speed-up"]
    else:
        assert settings["speed-up"] == pytest.approx(reported["speedup"], rel=1e-4)


def test_what_is_no_path_is_refused():
    """Catches a TypeError of pathlib's, and an empty name taken for the folder one is in."""
    for path in (3, "", None):
        with pytest.raises(ValueError, match=r"path must be the name of a file, such as 'trace\.html', got "):
            viewer.writer(path)  # type: ignore[arg-type]


def test_a_bad_path_is_told_before_anything_is_loaded(command):
    """Catches minutes of generation thrown away."""
    process = command(
        "x", "--trace", "/proc/nowhere/trace.html", "--model", "/proc/no/model", "--draft", "/proc/no/model"
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "there is no folder /proc/nowhere" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("phase", ["streaming", "baseline"])
def test_ctrl_c_leaves_the_rounds_so_far(command, tmp_path, phase):
    """Catches an interrupted run without its page, while tokens come or while plain decoding is measured after them."""
    path = tmp_path / "trace.html"
    if phase == "streaming":
        process = command("import numpy", "--max-new-tokens", 100_000, "--no-baseline", "--trace", path)
        assert process.stdout.read(20)
        time.sleep(0.2)
    else:
        process = command("import numpy", "--max-new-tokens", 300, "--trace", path)
        while process.poll() is None and not path.exists():
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    row = _page_data(path)["rows"][0]
    assert row["rounds"]
    assert row["text"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.html"]
