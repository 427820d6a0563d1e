"""Take a picture of a page with headless Chromium: ``python scripts/screenshot.py URL OUT.png``."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BINARIES)), None)


class Browser:
    """One tab of a headless Chromium. The DevTools protocol controls it. It is a context manager.

    Args:
        binary: Path of Chromium.

    Attributes:
        problems: Errors of the console, uncaught exceptions, and anything that the page's own policy blocked.
    """

    def __init__(self, binary: str) -> None:
        self.problems: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="chromium_", ignore_cleanup_errors=True)
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._number = 0
        try:
            self._run(self._connect())
            for domain in ("Page", "Runtime", "Log"):
                self.command(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End Chromium."""
        if hasattr(self, "_session"):
            self._run(self._session.close())
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._loop.close()
        self._profile.cleanup()

    def _run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 30))

    async def _connect(self) -> None:
        file = Path(self._profile.name, "DevToolsActivePort")
        while not (file.exists() and file.read_text().count("\n")):
            if self._process.poll() is not None:
                raise RuntimeError(f"Chromium ended with exit code {self._process.returncode}")
            await asyncio.sleep(0.05)
        port = int(file.read_text().split()[0])
        self._session = aiohttp.ClientSession()
        while True:
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [target for target in await answer.json() if target["type"] == "page"]
            if tabs:
                break
            await asyncio.sleep(0.05)
        self._socket = await self._session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result.

        Raises:
            RuntimeError: Chromium answers with an error.
        """
        return self._run(self._command(method, parameters))

    async def _command(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self._socket.receive_str())
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._notice(message.get("method"), message.get("params", {}))

    def _notice(self, method: str | None, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(str([a.get("value", a.get("description")) for a in parameters["args"]]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load ``url`` in a window of this size, in pixels."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        result = self.command("Page.navigate", url=url)
        if "errorText" in result:
            raise RuntimeError(f"{url}: {result['errorText']}")

    def resize(self, width: int, height: int) -> None:
        """Change the window's size, in pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression.

        Raises:
            RuntimeError: the expression throws an error.
        """
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 10) -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            TimeoutError: the expression is not true in time.
        """
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {seconds} s: {expression}")
            time.sleep(0.05)

    def picture(self, path: Path, whole: bool = False) -> None:
        """Save a PNG of the window, or of the whole page."""
        if whole:
            height = self.evaluate("document.documentElement.scrollHeight")
            self.resize(self.evaluate("innerWidth"), height)
            time.sleep(0.3)
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, help="default: that of the whole page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--wait", type=float, default=3, metavar="SECONDS", help="after loading (default: 3)")
    parser.add_argument("--api-key", help="sent with every request")
    args = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        print(f"error: none of {', '.join(BINARIES)} is on PATH; install one", file=sys.stderr)
        return 2
    with Browser(binary) as browser:
        if args.api_key:
            browser.command("Network.enable")
            browser.command("Network.setExtraHTTPHeaders", headers={"Authorization": f"Bearer {args.api_key}"})
        browser.open(args.url, args.width, args.height or 900, args.dark)
        time.sleep(args.wait)
        browser.picture(args.out, whole=args.height is None)
        for problem in browser.problems:
            print(f"the page reports: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
