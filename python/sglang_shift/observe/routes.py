"""Adds routes to SGLang's HTTP server: the status page, its data, and policies by name."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from sglang_shift.errors import RequestRefused
from sglang_shift.flags import POLICIES
from sglang_shift.observe.events import prepare_endpoint
from sglang_shift.observe.hub import Hub
from sglang_shift.seams import extends

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPLICAS_VARIABLE = "SGLANG_SHIFT_REPLICAS"
"""Environment variable with the number of replicas. The launcher sets it for the HTTP workers that it starts."""

APP_VARIABLE = "SGLANG_HTTP_SERVER_APP_PATH"
"""SGLang's environment variable: it names the app that the workers of ``--tokenizer-worker-num`` import."""

PAGE = Path(__file__).parent / "static" / "shift.html"

NOT_READY = (
    "no state of the scheduler has arrived yet; try again when the model has loaded, and see the server's log for "
    "why it has no events if none arrives"
)

REUSE_SECONDS = 0.5
"""Seconds for which one snapshot is the answer to all requests."""


def start(replicas: int = 1, metric_labels: Mapping[str, str] | None = None) -> Hub:
    """Observe from this process on. The launcher calls this once, before it starts SGLang's server.

    This chooses the endpoint of the events. It also adds the page to this server and to the workers of
    ``--tokenizer-worker-num``. Only this process feeds the metrics.

    Args:
        replicas: Number of data-parallel replicas (``--dp-size``).
        metric_labels: Labels of every metric, ``model_name`` first; None without ``--enable-metrics``.

    Returns:
        The hub, which runs.
    """
    from sglang.srt.entrypoints.http_server import app

    prepare_endpoint(replicas)
    os.environ[REPLICAS_VARIABLE] = str(replicas)
    os.environ.setdefault(APP_VARIABLE, "sglang_shift.observe.http_worker:app")
    hub = Hub(replicas)
    if metric_labels is not None:
        from sglang_shift.observe.metrics import Metrics

        hub.listeners.append(Metrics(metric_labels))
    hub.start()
    install(hub, app)
    return hub


@extends(
    "sglang.srt.entrypoints.http_server:app", "Our routes serve the page and its data, and let a request name a policy."
)
def install(hub: Hub, app: FastAPI) -> None:
    """Put our routes before the app's routes, which do not change. The app's API key protects all routes but the page.

    Args:
        hub: The source of the data.
        app: SGLang's app.
    """
    page, build = page_route(), app.build_middleware_stack
    # SGLang adds the middleware that checks its key later than this. So it would wrap our middleware in any case.
    app.build_middleware_stack = lambda: PublicRoute(page, build())  # type: ignore[method-assign]
    routes: list[BaseRoute] = [page, *router(hub).routes, *instance_router().routes]
    routes += [PolicyNames(r) for r in app.router.routes if getattr(r, "path", None) == "/set_internal_state"]
    app.router.routes[:0] = routes
    app.add_exception_handler(RequestRefused, refuse)


async def refuse(request: Request, error: Exception) -> Response:
    """Answer a refused request. Some of SGLang's routes for operators catch no error."""
    return _json({"error": {"message": str(error)}}, 400)


def page_route() -> Route:
    """``GET /shift``, the page. It is the same for everyone and holds no data, so it needs no key."""
    page, policy = load_page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def shift_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return Route("/shift", shift_page, include_in_schema=False)


class PublicRoute:
    """Answers one route before the rest of the app sees the request, so this route needs no API key.

    Args:
        route: The route that needs no key.
        app: The app with its middleware.
    """

    def __init__(self, route: BaseRoute, app: ASGIApp) -> None:
        self.route, self.app = route, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the requests of the route, and hand over all others."""
        match, child = self.route.matches(scope) if scope["type"] == "http" else (Match.NONE, {})
        if match is Match.FULL:
            await self.route.handle({**scope, **child}, receive, send)
        else:
            await self.app(scope, receive, send)


def router(hub: Hub) -> APIRouter:
    """``GET /shift/status``, the page's data."""
    api_router = APIRouter()
    cache = _Cache(hub)

    # Not async: FastAPI then runs it in threads, so it never blocks the event loop.
    @api_router.get("/shift/status")
    def shift_status() -> Response:
        """Modes, queue, step times and requests of the last minutes."""
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        if not hub.ready:
            body = msgspec.json.encode({"error": NOT_READY})
            return Response(body, 503, media_type="application/json", headers=headers)
        return Response(cache.get(), media_type="application/json", headers=headers)

    return api_router


def instance_router() -> APIRouter:
    """``/shift/instances``: the instances of a server with ``--instances``, and a way to merge and split them by hand.

    The admin key protects the change, as it protects SGLang's own requests that change a server.
    """
    from sglang.srt.utils.auth import AuthLevel, auth_level

    api_router = APIRouter()

    @api_router.get("/shift/instances")
    async def shift_instances() -> Response:
        """The instances, their loads, and the last changes."""
        return await _ask_controller({})

    @api_router.post("/shift/instances")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def change_shift_instances(request: Request) -> Response:
        """Merge or split: ``{"level": K}``, and ``first`` and ``ranks`` if not all ranks change."""
        try:
            wanted = msgspec.json.decode(await request.body(), type=Wanted)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _json({"error": f"the body is not as {WANTED}: {error}"}, 400)
        return await _ask_controller(msgspec.structs.asdict(wanted))

    return api_router


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """What the body of ``POST /shift/instances`` has: see ``ChangeInstancesReqInput``."""

    level: int
    first: int = 0
    ranks: int | None = None
    reason: str = "an operator"


WANTED = '{"level": 2, "first": 0, "ranks": 4}'


@extends(
    "sglang.srt.entrypoints.http_server:get_global_state",
    "Our routes ask the tokenizer manager, as SGLang's routes do.",
)
async def _ask_controller(values: dict[str, Any]) -> Response:
    from sglang.srt.entrypoints.http_server import get_global_state

    answer = await get_global_state().tokenizer_manager.change_instances(**values)
    if answer.success:
        return _json(answer.report, 200)
    return _json({"error": answer.message, **answer.report}, 400)


def _json(value: Any, status: int) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


class _Cache:
    """The encoded snapshot. It is made again at most every :data:`REUSE_SECONDS`, however many pages are open."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._lock = threading.Lock()
        self._built_at = float("-inf")
        self._body = b""

    def get(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._built_at > REUSE_SECONDS:
                self._body = msgspec.json.encode(self._hub.snapshot())
                self._built_at = time.monotonic()
            return self._body


def load_page() -> tuple[bytes, str]:
    """Return the page, and the Content-Security-Policy that allows only the page's own style and script."""
    text = PAGE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


class PolicyNames(BaseRoute):
    """SGLang's ``/set_internal_state``, which also takes policies by name.

    SGLang's request carries only numbers, so the name is replaced by its index in ``POLICIES``. Handler, validation and
    level of authentication are SGLang's own.

    Args:
        stock: SGLang's route.
    """

    def __init__(self, stock: BaseRoute) -> None:
        self.stock = stock

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return self.stock.matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, replace the name of a policy, and hand over the request.

        Raises:
            HTTPException: 400, the name is unknown.
        """
        message: Message = {"type": "http.request", "body": policy_index(await Request(scope, receive).body())}
        messages = iter([message])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self.stock.handle(scope, replay, send)


def policy_index(body: bytes) -> bytes:
    """Return ``body`` with an index instead of the policy's name in ``shift_policy``, or as it is if there is no name.

    Raises:
        HTTPException: 400, the name is unknown.
    """
    try:
        value: Any = msgspec.json.decode(body)
        name = value["server_args"]["shift_policy"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return body  # if something is wrong with it, SGLang says so
    if not isinstance(name, str):
        return body
    if name not in POLICIES:
        raise HTTPException(400, f"there is no shift_policy {name[:80]!r}; choose one of {', '.join(POLICIES)}")
    value["server_args"]["shift_policy"] = POLICIES.index(name)
    return msgspec.json.encode(value)
