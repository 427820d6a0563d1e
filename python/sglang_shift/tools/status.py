"""``python -m sglang_shift.status`` shows what a server does, live in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from rich.console import Console, RenderableType
from rich.live import Live

from sglang_shift.errors import print_error
from sglang_shift.observe.events import SCHEMA
from sglang_shift.tools.status_view import plain, view

TIMEOUT_S = 10.0


class StatusError(Exception):
    """Says in one sentence why there is nothing to show.

    Args:
        message: The sentence.
        retry: Whether to try again, because the server is only starting.
    """

    def __init__(self, message: str, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


def status_url(url: str) -> str:
    """Return the address of a server's data.

    Raises:
        StatusError: ``url`` is not the address of an HTTP server.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    if not valid or any(c.isspace() or not c.isprintable() for c in url):
        raise StatusError(f"{url!r} is not the address of a server; give one like http://127.0.0.1:30000")
    return url.rstrip("/").removesuffix("/shift") + "/shift/status"


def fetch(url: str, api_key: str | None = None) -> dict[str, Any]:
    """Return the server's snapshot.

    Args:
        url: From :func:`status_url`.
        api_key: Sent as a bearer token.

    Raises:
        StatusError: there is no snapshot. The message says why.
    """
    server = url.removesuffix("/shift/status")
    not_ours = StatusError(
        f"{server} answers, but not as sglang_shift started with --sp-size or --enable-shift-parallel"
    )
    answer = _get(url, api_key)
    if answer.status_code == 401:
        raise StatusError(f"{server} wants {'another' if api_key else 'an'} API key; give it with --api-key")
    if answer.status_code == 503 and (reason := _reason(answer)):
        raise StatusError(f"{server} is starting: {reason}", retry=True)
    if answer.status_code != 200:
        raise not_ours
    try:
        value = answer.json()
    except ValueError as error:
        raise not_ours from error
    if not isinstance(value, dict) or "schema" not in value:
        raise not_ours
    if value["schema"] != SCHEMA:
        raise StatusError(f"{server} has schema {value['schema']}, this is for {SCHEMA}; use the server's version")
    return value


def _get(url: str, api_key: str | None) -> requests.Response:
    """Return a server's answer with any status code.

    The API key goes to the server that the user named, and to no other server. No password of ~/.netrc takes its place.
    """

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if api_key:
            request.headers["Authorization"] = f"Bearer {api_key}"
        return request

    try:
        return requests.get(url, auth=sign, allow_redirects=False, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        problem = f"{url.removesuffix('/shift/status')} cannot be reached ({_cause(error)})"
        raise StatusError(f"{problem}; check the address, and that it runs") from error
    except ValueError as error:
        raise StatusError("the address and --api-key must be plain ASCII, without line breaks") from error


def _cause(error: BaseException) -> BaseException:
    """Return the first error of a chain, which is the error of the operating system or of the other end."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _reason(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return ""


def watch(url: str, api_key: str | None, interval: float, as_json: bool, console: Console) -> None:
    """Show the server until the user interrupts. After the first answer, go on even if the server does not answer.

    Raises:
        StatusError: the server gave no first answer.
    """
    data: dict[str, Any] | None = None
    screen = console.is_terminal and not as_json
    with Live(console=console, screen=True, auto_refresh=False) if screen else contextlib.nullcontext() as live:
        while True:
            problem = ""
            try:
                data = fetch(url, api_key)
            except StatusError as error:
                if data is None and not error.retry:
                    raise
                problem = str(error)
            if live is not None:
                live.update(_shown(data, url, problem, console), refresh=True)
            elif problem:
                print(problem, file=sys.stderr, flush=True)
            else:
                _print(data, url, as_json, console)
            time.sleep(interval)


def _shown(data: dict[str, Any] | None, url: str, problem: str, console: Console) -> RenderableType:
    if data is None:
        return plain(problem)
    return view(data, url.removesuffix("/shift/status"), problem, max(1, console.height - 22), _unicode(console))


def _print(data: dict[str, Any] | None, url: str, as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(data), flush=True)
    else:
        with console.capture() as text:  # printed without rich, which exits with 1 when a pipe's reader leaves
            console.print(_shown(data, url, "", console))
        print(text.get(), end="", flush=True)


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def main(argv: Sequence[str]) -> int:
    """Show the server and return the exit code. After an error it is 2, with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m sglang_shift.status", description="Watch a server's modes.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    parser.add_argument("--api-key", help="the server's --api-key; its --admin-api-key is not asked for here")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.add_argument("--json", action="store_true", help="print the data of /shift/status, a line each time")
    args = parser.parse_args(argv)
    if not 0.1 <= args.interval <= 3600:
        parser.error("--interval must be between 0.1 and 3600 seconds")
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = Console()
    try:
        url = status_url(args.url)
        if args.once:
            _print(fetch(url, args.api_key), url, args.json, console)
        else:
            watch(url, args.api_key, args.interval, args.json, console)
    except StatusError as error:
        return print_error(error, "sglang_shift.status")
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # the reader of the pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
