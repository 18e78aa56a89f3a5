"""Chromium without a window, driven over a pipe, to look at pages as a reader would."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A page of a browser.

    Args:
      send: the pipe on which it reads commands.
      receive: the pipe on which it answers.

    Attributes:
      events: what it told unasked: (method, parameters).
    """

    def __init__(self, send: Any, receive: Any):
        self._send, self._receive = send, receive
        self._count, self._session = 0, {}
        self.events: list[tuple[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol; return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, width: int) -> None:
        """Open a file in a window of a width, in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._read()

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"][
            "value"
        ]

    def screenshot(self) -> bytes:
        """Return the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def requests(self) -> list[str]:
        """Return what the page has asked for."""
        asked = [p for method, p in self.events if method == "Network.requestWillBeSent"]
        return [parameters["request"]["url"] for parameters in asked]

    def complaints(self) -> list[Any]:
        """Return what the page wrote to the console, and what the browser says of it."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [(method, p) for method, p in self.events if method in methods]

    def _read(self) -> Any:
        message = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        answer = json.loads(message)
        if "method" in answer:
            self.events.append((answer["method"], answer["params"]))
        return answer


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start a browser whose profile is in a folder."""
    assert CHROMIUM
    commands, answers = os.pipe(), os.pipe()
    read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands[0], answers[1]))
    ends = f"exec 3<&{read} 4>&{write}; exec"  # it reads descriptor 3 and writes descriptor 4
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-dev-shm-usage"]
    process = subprocess.Popen(
        ["bash", "-c", f'{ends} "$@"', "bash", CHROMIUM, *flags],
        pass_fds=(read, write),
        stderr=subprocess.DEVNULL,
    )
    for descriptor in (read, write, commands[0], answers[1]):
        os.close(descriptor)
    with os.fdopen(commands[1], "wb") as send, os.fdopen(answers[0], "rb") as receive:
        try:
            yield Browser(send, receive)
        finally:
            process.kill()
            process.wait()
