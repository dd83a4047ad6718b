"""A headless Chromium, driven by the DevTools protocol over its pipe: no driver, no port."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")  # Debian, Ubuntu, Google
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
    "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
]  # fmt: skip
SECONDS = 120.0  # until a page has loaded on a busy machine
# Chromium reads commands from descriptor 3 and writes answers to 4.
START = 'exec "$@" 3<&"$0" 4>&"$OUT"'


class Page:
    """One page, and all that it requested and complained about."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands = commands
        self.answers = answers
        self.buffer = b""
        self.number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self) -> dict[str, Any]:
        """The next message: an answer or an event."""
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 1 << 20)
            assert part, "Chromium has ended"
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self.commands, content) :]
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, address: str) -> None:
        """Load a page to its end."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page did not load"
            self.events.append(self.read())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited, as after a user's gesture."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        own = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)} | (
            {"text": text} if text else {}
        )
        self.call("Input.dispatchKeyEvent", type="keyDown", **own)
        self.call("Input.dispatchKeyEvent", type="keyUp", **own)

    def requests(self) -> list[str]:
        """Addresses that were requested, but for data: URIs, which are in the page itself."""
        self.evaluate("1")  # events so far have arrived
        sent = (
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        )
        return [url for url in sent if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions and violations of the policy."""
        self.evaluate("1")
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event) for event in self.events if event["method"] in kinds]

    def screenshot(
        self, path: Path, *, width: int, height: int, dark: bool = False, whole: bool = False
    ) -> None:
        """Save what is seen at a window's size, or the whole page at that width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width, height)
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A Chromium of its own, ended afterwards.

    Args:
        profile: an empty folder.
    """
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", START, str(read_commands), CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read_commands, write_answers),
        env=os.environ | {"OUT": str(write_answers), "HOME": str(profile)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Page(write_commands, read_answers)
    finally:
        process.terminate()
        process.wait()
        os.close(write_commands)
        os.close(read_answers)
