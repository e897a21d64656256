"""A real browser without a window: chromium, driven over the DevTools protocol through two pipes.

https://chromedevtools.github.io/devtools-protocol. With --remote-debugging-pipe chromium reads JSON messages, each
ended by a zero byte, from descriptor 3 and writes its own to descriptor 4; so it takes neither a port nor a WebSocket.
"""

import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = f"no {', '.join(NAMES)} in PATH and no CHROMIUM; on Debian: apt-get install --no-install-recommends chromium"
_SECONDS = 60  # a busy machine starts a browser slowly

# Moves the pipes' ends to 3 and 4, then becomes the browser.
_LAUNCH = """
import fcntl, os, sys
commands, events = (fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(events, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def executable() -> str | None:
    """Returns the browser that CHROMIUM or PATH names, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one page; a context manager."""

    def __init__(self, folder: pathlib.Path):
        """Starts the browser with a profile of its own in the folder."""
        read_commands, self._commands = os.pipe()
        self._events, write_events = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
        launch = [sys.executable, "-c", _LAUNCH, str(read_commands), str(write_events), str(executable())]
        self._process = subprocess.Popen(
            [*launch, *flags, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(read_commands, write_events),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_events)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors: list[str] = []  # what pages threw or complained about
        (page,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._events)

    def call(self, method: str, **params: Any) -> dict:
        """Returns the result of a command of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, url: str) -> None:
        """Goes to a page."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Returns the JSON value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Returns the expression's value once it is true."""
        end = time.monotonic() + _SECONDS
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def press(self, key: str, code: int, *, held: bool = False, modifiers: int = 0) -> None:
        """Presses a key as a keyboard does: down (again and again while it is held), then up."""
        text = {"text": key} if len(key) == 1 else {}
        common: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        for _ in range(3 * held):
            time.sleep(0.2)
            self.call("Input.dispatchKeyEvent", type="keyDown", autoRepeat=True, **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._events], [], [], _SECONDS)
            data = os.read(self._events, 65536) if ready else b""
            assert data, f"the browser does not answer (exit status {self._process.poll()})"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"]["text"])
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            entry = message["params"]["entry"]
            self.errors.append(f"{entry['text']} {entry.get('url', '')}")
        return message
