"""Headless Chromium for tests, driven by chromedriver (W3C WebDriver: JSON over HTTP)."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


class Browser:
    """A browser window, with its console messages and requests."""

    def __init__(self, session: str) -> None:
        self.session = session

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript, the body of a function, and return its result."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Set the window's size, and whether the reader prefers dark colours."""
        self._tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._tell("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: Path) -> None:
        """The whole page, as long as it is."""
        shot = self._tell("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def console(self) -> list[str]:
        """The console messages since the last call."""
        return [line["message"] for line in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses requested since the last call, including the page's own."""
        events = [
            json.loads(line["message"])["message"] for line in self._call("POST", "/se/log", {"type": "performance"})
        ]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def _tell(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _ask(method, self.session + path, body)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test where there is none."""
    driver = shutil.which("chromedriver")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if driver is None or program is None:
        pytest.skip("no Chromium with its chromedriver is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    session = ""
    try:
        home = f"http://127.0.0.1:{port}"
        _wait(home)
        capabilities = {
            "goog:chromeOptions": {"binary": program, "args": _FLAGS},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = _ask("POST", f"{home}/session", {"capabilities": {"alwaysMatch": capabilities}})
        session = f"{home}/session/{answer['sessionId']}"
        yield Browser(session)
    finally:
        if session:
            _ask("DELETE", session, None)
        process.terminate()
        process.wait(timeout=20)


def _wait(home: str) -> None:
    for _ in range(200):
        try:
            if _ask("GET", f"{home}/status", None)["ready"]:
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("chromedriver does not answer")


def _ask(method: str, address: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from None
