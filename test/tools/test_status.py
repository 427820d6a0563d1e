"""``python -m sglang_shift.status`` against servers good and bad."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from sglang.srt.utils.auth import add_api_key_middleware
from sglang_shift.modes import Mode
from sglang_shift.observe import routes
from sglang_shift.observe.events import Finished, StateEvent, StepEvent
from sglang_shift.observe.hub import Hub
from sglang_shift.tools import status
from sglang_shift.tools.status_view import sparkline, view

MARKUP = "[red]x[/red] [/] [link=http://a]b \x1b[31m\x07"


def snapshot(**changes) -> dict:
    now = time.time()
    clock = iter([now, now, now, now, now + 1])
    hub = Hub(clock=lambda: next(clock))
    hub.take(StateEvent(
        now, 4, 2, MARKUP, "calibrated", "the [bold]faster[/bold] mode", None, "", {}, 10, 0, {"tp": 5, "sp": 2},
        {"tp": 5, "sp": 600}, 3, running=6, waiting=2,
    ))  # fmt: skip
    done = [Finished(10, 5, 0.125, None, 2.5, {Mode.TP: 4, Mode.SP: 1})]
    hub.take(StepEvent(now, 1, "tp", "decode", 6, 0, 6, 2, 0, seconds=0.01, predicted={Mode.TP: 0.02, Mode.SP: 0.5},
                       gaps=[(0.0421, 6)]))  # fmt: skip
    hub.take(StepEvent(now, 2, "sp", "prefill", 600, 600, 6, 2, 50, 0.03, switched=True, reason=MARKUP, finished=done))
    return {**hub.snapshot(), **changes}


class FakeServer:
    """Answers every request with ``answer``: status, content type, body."""

    def __init__(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.requests.append((self.path, self.headers.get("Authorization")))
                code, headers, body = fake.answer
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.requests: list[tuple[str, str | None]] = []
        self.reply(snapshot())
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reply(self, value: object, code: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else msgspec.json.encode(value)
        self.answer = code, headers, body

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.stop()


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = status.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_once(server, capsys):
    code, out, err = run(capsys, server.url, "--once")
    assert code == 0 and err == "" and server.requests == [("/shift/status", None)]
    for part in (
        "4 ranks: TP 4 or SP 2 x TP 2", "the [bold]faster[/bold] mode", "[red]x[/red] [/] [link=http://a]b",
        "2 and 6 running; 50 prompt tokens", "3 in 7 steps", "TP decode", "10.0 ms", "0.50", "125 ms", "2.50 s",
        "gap, last minute", "42.1 ms",
    ):  # fmt: skip
        assert part in out, part
    assert "\x1b" not in out and "\x07" not in out


def test_json(server, capsys):
    code, out, _ = run(capsys, server.url, "--once", "--json")
    assert code == 0 and json.loads(out)["schema"] == 2


def test_the_key_and_the_path(server, capsys):
    for url in (server.url + "/", server.url + "/shift", server.url + "/prefix"):
        assert run(capsys, url, "--once", "--api-key", "secret")[0] == 0
    assert server.requests == [(p, "Bearer secret") for p in ("/shift/status", "/shift/status", "/prefix/shift/status")]


@pytest.mark.parametrize(
    ("configured", "right"),
    [
        ({"api_key": "secret", "admin_api_key": None}, {"secret"}),
        ({"api_key": "secret", "admin_api_key": "admin"}, {"secret"}),
        ({"api_key": None, "admin_api_key": "admin"}, {"secret", "admin", None}),
    ],
)
def test_keys_as_sglang_checks_them(capsys, configured, right):
    """By SGLang's middleware, over our routes."""
    app, hub = FastAPI(), Hub()
    hub.take(StateEvent(time.time(), 2, 2, "m", "p", "t", None, "", {}, 1, 0, {}, {}, 0))
    routes.install(hub, app)
    add_api_key_middleware(app, **configured)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            for key in ("secret", "admin", None):
                code, _, err = run(capsys, url, "--once", *([] if key is None else ["--api-key", key]))
                assert code == (0 if key in right else 2), (key, err)
                if key not in right:
                    assert f"wants {'another' if key else 'an'} API key; give it with --api-key" in err
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((b'{"error": "Unauthorized"}', 401), "wants an API key; give it with --api-key"),
        ((b"<html>", 404), "not as sglang_shift"),
        ((b"<html>", 200), "not as sglang_shift"),
        ((b"\xff\xfe", 200), "not as sglang_shift"),
        ((b'{"schema"', 200), "not as sglang_shift"),
        ((b"[]", 200), "not as sglang_shift"),
        ((b"{}", 200), "not as sglang_shift"),
        ((b"", 500), "not as sglang_shift"),
        ((b"busy", 503), "not as sglang_shift"),
        ((b'{"schema": 99}', 200), "schema 99"),
        ((b'{"error": "no state yet"}', 503), "is starting: no state yet"),
    ],
)
def test_errors_are_one_sentence(server, capsys, reply, expected):
    server.reply(*reply)
    code, out, err = run(capsys, server.url, "--once")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("sglang_shift.status: error: ") and expected in err


def test_the_key_is_not_sent_elsewhere(server, capsys):
    other = FakeServer()
    try:
        server.reply(b"", 302, Location=other.url + "/shift/status")
        assert run(capsys, server.url, "--once", "--api-key", "secret")[0] == 2
        assert other.requests == []
    finally:
        other.stop()


@pytest.mark.parametrize(
    "url",
    ["", "foo", "localhost:30000", "ftp://x", "http://", "http://x:port", "http://[::1", "http://a b", "file:///"],
)
def test_bad_urls(capsys, url):
    code, _, err = run(capsys, url, "--once")
    assert code == 2 and err.count("\n") == 1 and "is not the address of a server" in err


@pytest.mark.parametrize("key", ["a\nb", "käse \u2013"])
def test_bad_keys(server, capsys, key):
    code, _, err = run(capsys, server.url, "--once", "--api-key", key)
    assert code == 2 and err.count("\n") == 1


def test_unreachable(server, capsys):
    server.stop()
    code, _, err = run(capsys, server.url)
    assert code == 2 and err.count("\n") == 1 and "cannot be reached" in err and "refused" in err


def test_bad_interval(capsys):
    for interval in ("0", "-1", "nan", "1e9"):
        with pytest.raises(SystemExit) as stop:
            status.main(["--interval", interval])
        assert stop.value.code == 2 and "--interval" in capsys.readouterr().err


def start(*argv: str, **options) -> subprocess.Popen:
    """A view that Ctrl-C ends, though these tests run in the background of a shell, which has SIGINT ignored."""
    command = [sys.executable, "-m", "sglang_shift.status", *argv]
    return subprocess.Popen(command, preexec_fn=_heed_sigint, **options)  # noqa: PLW1509 - it takes no lock


def _heed_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_piped_it_goes_on_while_the_server_is_away_and_ends_on_ctrl_c(server, tmp_path):
    out = tmp_path / "out"
    with out.open("w") as file:
        process = start(server.url, "--interval", "0.1", "--json", stdout=file, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: "\n" in out.read_text())
        server.reply(b"", 500)
        assert "not as sglang_shift" in process.stderr.readline()
        lines = out.read_text().count("\n")
        server.reply(snapshot())
        wait_for(lambda: out.read_text().count("\n") > lines + 1)
        assert {json.loads(line)["schema"] for line in out.read_text().splitlines()} == {2}
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 0 and "Traceback" not in err
    finally:
        process.kill()
        process.wait()


def test_a_reader_that_leaves(server):
    process = start(server.url, "--interval", "0.1", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(10) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def test_in_a_terminal(server):
    main, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    process = start(server.url, "--interval", "0.1", stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    output = ""

    def shows(words: str) -> bool:
        nonlocal output
        output += os.read(main, 65536).decode()
        return words in output

    try:
        wait_for(lambda: shows("Throughput"))
        server.stop()
        wait_for(lambda: shows("what is shown is old"))
        process.send_signal(signal.SIGINT)
        with pytest.raises(OSError):  # the end of a terminal's output
            wait_for(lambda: shows("\0"))
        assert process.wait(10) == 0 and "Traceback" not in output
        assert "\x1b[?1049l" in output, "the terminal must be given back"
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_view_fits(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(view(snapshot(), "http://a", "gone"))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and any("gone" in line for line in lines)
    if width >= 80:
        assert next(line for line in lines if "Modes" in line).rstrip().endswith("steps")


def test_the_view_of_a_bound_on_the_gap_between_tokens():
    quantiles = {"p50": 640.0, "p90": 700.0, "p99": 700.0}
    chunks = {"count": 3, "tokens": quantiles, "room": {"p50": 1024.0}, "budget": {"p50": 0.08}, "over_budget": 0.0}
    for counted, words in ((chunks, "640 prompt tokens (median), 1,024 could fit 80.0 ms"), ({"count": 0}, "100 ms\n")):
        console = Console(file=io.StringIO(), width=200)
        console.print(view(snapshot(tbt={"target": 0.1, "margin": 1.0, "chunks": counted}), "http://a"))
        assert "gap between tokens: at most 100 ms" in console.file.getvalue()
        assert words in console.file.getvalue()
    console = Console(file=io.StringIO(), width=200)
    console.print(view(snapshot(), "http://a"))
    assert "gap between tokens" not in console.file.getvalue()


def test_the_view_without_anything():
    hub = Hub()
    hub.take(StateEvent(time.time(), 2, 2, "m", "p", "t", None, "", {}, 1, 0, {}, {}, 0))
    console = Console(file=io.StringIO(), width=80)
    console.print(view(hub.snapshot(), "http://a"))
    for part in (
        "no step in the last minute",
        "none has been timed yet",
        "none has finished yet",
        "has not changed yet",
    ):
        assert part in console.file.getvalue()


def test_sparkline():
    assert sparkline([], True) == "" and sparkline([0, None], True) == "  "
    assert sparkline([0, 1, 4, 8], True) == " ▁▄█" and sparkline([0, 8], False) == " @"
