"""Just enough of the Chrome DevTools Protocol to use the page as a person does."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

_TIMEOUT_S = 120.0


def find_browser() -> str | None:
    """A Chromium of this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, binary: str, profile: Path) -> None:
        self.violations: list[str] = []  # scripts that failed, and what the page's policy blocked
        self._number = 0
        self._process = subprocess.Popen(
            [
                binary,
                "--headless=new",
                "--no-sandbox",  # which a container's root cannot use
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--no-first-run",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._socket = connect(self._address(profile), max_size=None, open_timeout=_TIMEOUT_S, legacy=True)
        except BaseException:
            self._process.kill()
            raise
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _address(self, profile: Path) -> str:
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                port = (profile / "DevToolsActivePort").read_text().splitlines()[0]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
                    tabs = json.load(answer)
                return str(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
            except (OSError, IndexError, StopIteration):
                time.sleep(0.2)
        raise TimeoutError(f"Chromium opened no debugging port within {_TIMEOUT_S:.0f} s.")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; what the page complains of meanwhile is kept in `violations`."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=_TIMEOUT_S))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.violations.append(str(message["params"]["exceptionDetails"]))
            entry = message.get("params", {}).get("entry", {})
            if "Content Security Policy" in entry.get("text", ""):
                self.violations.append(entry["text"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """Waits until an expression is true."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"The page never came to: {script}; it shows {self.run('document.body.innerText')!r}")

    def press(self, key: str, *, shift: bool = False) -> None:
        """One key, as from a keyboard."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && location.href === {address!r}")

    def prefer(self, scheme: str, *, width: int = 1280, height: int = 1500) -> None:
        """Colour scheme and size of the window."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
