"""Chromium by its own protocol over two pipes, for pages that are tested, timed or photographed: no driver, no port.

    with Browser() as browser:
        page = browser.open("file:///tmp/trace.html")
        page.evaluate("document.title")

Protocol: https://chromedevtools.github.io/devtools-protocol/, by --remote-debugging-pipe: JSON, each message ended by a
zero byte, read by the browser from descriptor 3 and written to 4.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-device-scale-factor=1", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"Tab": 9, "Escape": 27, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
         "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip


def find() -> str | None:
    """A Chromium or Chrome on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A headless browser with a profile of its own, which goes with it."""

    def __init__(self, size: tuple[int, int] = (1280, 800)):
        binary = find()
        if binary is None:
            raise FileNotFoundError(f"no Chromium found: none of {', '.join(NAMES)} is on the path.")
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._writer, their_reader = _ends(reader_is_theirs=True)
        self._reader, their_writer = _ends(reader_is_theirs=False)
        flags = [*_FLAGS, f"--user-data-dir={self._profile}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        nowhere: list[Any] = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pipes: list[Any] = [(os.POSIX_SPAWN_DUP2, end, fd) for end, fd in ((their_reader, 3), (their_writer, 4))]
        self._pid = os.posix_spawn(binary, [binary, *flags], os.environ, file_actions=[*nowhere, *pipes])
        for end in (their_reader, their_writer):
            os.close(end)
        self._unread = b""
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self.call("Browser.close", seconds=10)
        for _ in range(100):
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                break
            time.sleep(0.1)
        else:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._writer)
        os.close(self._reader)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, url: str) -> Page:
        """A new page, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired", session)
        page.settle()
        return page

    def call(self, method: str, session: str | None = None, seconds: float = 60, **params: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are kept."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writer, data) :]
        deadline = time.monotonic() + seconds
        while (reply := self._receive(deadline)).get("id") != self._last:
            self.events.append(reply)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def wait_for(self, method: str, session: str, seconds: float = 60) -> None:
        """Until this event has come."""
        deadline = time.monotonic() + seconds
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._receive(deadline))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._reader], [], [], left)[0]:
                raise TimeoutError("the browser did not answer.")
            data = os.read(self._reader, 1 << 20)
            if not data:
                raise OSError("the browser went away.")
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


class Page:
    """One page, driven as by a person: by mouse, wheel and keys."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise's, when it is kept."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", found["exceptionDetails"]))
        return found["result"].get("value")

    def settle(self) -> None:
        """Until the page has been drawn twice: what events put off has happened."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is: x, y, width, height."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def hover(self, selector: str) -> None:
        box = self.box(selector)
        self.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def click(self, selector: str) -> None:
        box = self.box(selector)
        self.click_at(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def click_at(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def wheel(self, x: float, y: float, by: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=by)
        self.settle()

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])
        self.settle()

    def prefer(self, scheme: str) -> None:
        """The system's colour scheme: light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.settle()

    def screenshot(self, path: str | Path) -> None:
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Errors, warnings and uncaught exceptions so far."""
        self.evaluate("0")
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self._events(*kinds)]

    def requests(self) -> list[str]:
        """What the page asked for, itself included."""
        self.evaluate("0")
        return [event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        return [
            event
            for event in self._browser.events
            if event.get("method") in methods and event.get("sessionId") == self._session
        ]


def _ends(reader_is_theirs: bool) -> tuple[int, int]:
    """(ours, theirs) of a new pipe, both clear of the descriptors that the browser expects them at."""
    reader, writer = os.pipe()
    low = [reader, writer]
    reader, writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return (writer, reader) if reader_is_theirs else (reader, writer)
