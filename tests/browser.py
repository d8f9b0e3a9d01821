"""A headless Chromium, driven over the devtools protocol: what a page logs, asks for, shows."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--remote-allow-origins=*",
         "--hide-scrollbars", "--no-first-run", "--disable-background-networking")


class Browser:
    """One page of one browser. `events` are those of the page that is open, as the protocol names them."""

    def __init__(self) -> None:
        self.folder = TemporaryDirectory(ignore_cleanup_errors=True)
        port = Path(self.folder.name) / "DevToolsActivePort"
        self.process = subprocess.Popen([str(CHROMIUM), *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while not port.exists() or not port.read_text().strip():
            assert time.monotonic() < until and self.process.poll() is None, "the browser did not start"
            time.sleep(0.05)
        number, path = port.read_text().split()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{number}{path}", timeout=30)
        self.numbers, self.session = itertools.count(1), None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
        self.folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        self.socket.send(json.dumps(message))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def shape(self, width: int, dark: bool = False) -> None:
        """The window's width in pixels, below 500 that of a phone, and the reader's colours."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, address: str) -> None:
        """Load a page, from nothing, and wait until it is loaded."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=address)
        while self.value("document.readyState") != "complete" or self.value("location.href") == "about:blank":
            time.sleep(0.01)

    def value(self, script: str) -> Any:
        """What a JavaScript expression is in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """A key, as Tab or Enter, or a character."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowDown": 40}
        named = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)} | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def type(self, text: str) -> None:
        """Characters, into what has the focus."""
        self.call("Input.insertText", text=text)

    def problems(self) -> list[str]:
        """What the page logged as an error or warning, and every address it asked for that is no file beside it."""
        self.value("1")  # so that what was on its way has come
        found = []
        for event in self.events:
            method, said = event.get("method"), event.get("params", {})
            logged = method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning")
            if logged or method == "Runtime.exceptionThrown":
                found.append(json.dumps(said)[:300])
            elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                found.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
            elif method == "Network.requestWillBeSent" and not said["request"]["url"].startswith(("file:", "data:", "about:")):
                found.append(f"asks for {said['request']['url']}")
        return found

    def picture(self, path: Path, whole: bool = True) -> None:
        """A screenshot of the page, its whole length if asked."""
        height = min(self.value("document.documentElement.scrollHeight"), 16000) if whole else 900
        size = self.value("innerWidth")
        made = self.call("Page.captureScreenshot", captureBeyondViewport=True,
                         clip={"x": 0, "y": 0, "width": size, "height": height, "scale": 1})
        path.write_bytes(base64.b64decode(made["data"]))
