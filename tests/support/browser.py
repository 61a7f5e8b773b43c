"""A real headless Chromium, spoken to over its own pipe: the DevTools protocol, JSON between NUL bytes.

A driver's library would be a dependency with a port, a second process and a version to keep in step; what these
tests ask (colour schemes, phones' widths, the console, every request, keys) is said in this protocol anyway.
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ANSWER_WITHIN_S = 30.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
DESKTOP, PHONE, NARROW = (1280, 900), (390, 844), (320, 640)


class Browser:
    """One tab. `events` holds everything that the browser has sent since it started."""

    def __init__(self, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._sent = 0
        self._rest = b""
        self._session: str | None = None
        self._folder = folder

    def __enter__(self) -> Self:
        self._start()
        try:
            self._attach()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self) -> None:
        """Start Chromium, which reads from its descriptor 3 and writes to 4."""
        assert CHROMIUM is not None
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        log = os.open(self._folder / "chromium.log", os.O_WRONLY | os.O_CREAT)
        moved = ((ends[0], 3), (ends[1], 4), (log, 1), (log, 2))
        profile = f"--user-data-dir={self._folder / 'profile'}"
        self._pid = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *FLAGS, profile, "about:blank"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, end, place) for end, place in moved],
            setpgroup=0,
        )
        for end in (theirs_in, theirs_out, log, *ends):
            os.close(end)

    def _end(self) -> None:
        """End the browser with all processes of its group."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)

    # The page

    def open(self, url: str, headers: dict[str, str] | None = None) -> None:
        """Open the address, and return when all of it is loaded."""
        self.ask("Network.setExtraHTTPHeaders", headers=headers or {})
        seen = len(self.events)
        self.ask("Page.navigate", url=url)
        self._until(lambda: any(e["method"] == "Page.loadEventFired" for e in self.events[seen:]))

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page. Content-Security-Policy does not bind the protocol."""
        said = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer(self, **features: str) -> None:
        """Set media features: prefers_color_scheme="dark" …"""
        named = [{"name": n.replace("_", "-"), "value": value} for n, value in features.items()]
        self.ask("Emulation.setEmulatedMedia", features=named)

    def press_tab(self) -> None:
        key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        self.ask("Input.dispatchKeyEvent", type="rawKeyDown", **key)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **key)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **key)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **key)

    def picture(self, path: Path) -> None:
        """Take a picture of the whole page at its full height."""
        said = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(said["data"]))

    # The protocol

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        order: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            order["sessionId"] = self._session
        os.write(self._to, json.dumps(order).encode() + b"\0")
        wanted = self._sent
        self._until(lambda: wanted in self._answers)
        answer = self._answers.pop(wanted)
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def _attach(self) -> None:
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def _until(self, done: Any) -> None:
        end = time.monotonic() + ANSWER_WITHIN_S
        while not done():
            left = end - time.monotonic()
            assert left > 0, "Chromium did not answer"
            if select.select([self._from], [], [], left)[0]:
                self._read()

    def _read(self) -> None:
        got = os.read(self._from, 1 << 16)
        assert got, "Chromium ended; see chromium.log"
        *messages, self._rest = (self._rest + got).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)
