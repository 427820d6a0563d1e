"""The routes that we add to SGLang's server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from typing import Annotated

import pytest
from fastapi import Body, FastAPI, Request
from fastapi.testclient import TestClient
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.utils.auth import AuthLevel, add_api_key_middleware, auth_level
from sglang_shift.errors import RequestRefused
from sglang_shift.flags import POLICIES
from sglang_shift.observe import routes
from sglang_shift.observe.events import StateEvent
from sglang_shift.observe.hub import Hub

STATE = StateEvent(
    time=time.time(), world_size=2, sp_size=2, model="<b>demo</b>", policy="tokens", policy_text="SP above 256",
    calibration=None, calibration_text="", drift={}, weight_bytes=1, weight_bytes_beyond_base=0,
    steps={"tp": 1, "sp": 2}, tokens={"tp": 1, "sp": 2}, switches=1,
)  # fmt: skip


def stock_app() -> FastAPI:
    """An app with a route like SGLang's."""
    app = FastAPI()

    @app.api_route("/set_internal_state", methods=["POST", "PUT"])
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def set_internal_state(obj: Annotated[SetInternalStateReq, Body()], request: Request):
        return obj.server_args

    @app.get("/other")
    async def other():
        return "other"

    return app


@pytest.fixture
def hub():
    hub = Hub()
    hub.take(STATE)
    return hub


@pytest.fixture
def app(hub):
    app = stock_app()
    routes.install(hub, app)
    return app


@pytest.fixture
def client(app):
    return TestClient(app)


def test_the_page_is_html_that_runs_only_its_own_script(client):
    answer = client.get("/shift")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[tag])
    assert len(re.findall(r"<script\b", answer.text)) == 1 and not re.search(r"\bon\w+=\"|\bstyle=\"", answer.text)
    assert not re.search(r"(src|href)=\"(?!data:,)", answer.text), "the page must not load anything"
    assert "innerHTML" not in answer.text and "insertAdjacentHTML" not in answer.text


def test_status(client):
    answer = client.get("/shift/status")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert answer.json()["model"] == "<b>demo</b>" and answer.json()["schema"] == 2


def test_a_refused_request_of_an_operator_is_the_clients_error(app, client):
    """As of a route of SGLang's that catches no error."""

    @app.post("/start_profile")
    async def start_profile():
        raise RequestRefused("give another")

    answer = client.post("/start_profile")
    assert answer.status_code == 400 and answer.json() == {"error": {"message": "give another"}}


def test_status_before_the_first_state():
    app = stock_app()
    hub = Hub()
    routes.install(hub, app)
    client = TestClient(app)
    answer = client.get("/shift/status")
    assert answer.status_code == 503 and answer.json() == {"error": routes.NOT_READY}
    assert client.get("/shift").status_code == 200
    hub.take(STATE)
    assert client.get("/shift/status").status_code == 200


def test_many_readers_share_a_snapshot(hub, client, monkeypatch):
    calls = []
    original = Hub.snapshot
    monkeypatch.setattr(Hub, "snapshot", lambda self: calls.append(1) or original(self))
    for _ in range(10):
        assert client.get("/shift/status").status_code == 200
    assert len(calls) <= 2


def test_other_methods_and_routes(client):
    assert client.post("/shift").status_code == 405
    assert client.post("/shift/status").status_code == 405
    assert client.get("/other").json() == "other"
    assert client.get("/set_internal_state").status_code == 405
    assert client.get("/openapi.json").status_code == 200


KEYS = {"no key": None, "wrong": "wrong", "api": "secret", "admin": "admin"}
CONFIGURED = [(None, None), ("secret", None), (None, "admin"), ("secret", "admin")]


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("api_key", "admin_api_key"), CONFIGURED)
def test_the_data_is_protected_as_server_info_is(app, api_key, admin_api_key):
    """Of SGLang's own app, whose server_info decides; an --admin-api-key alone protects neither."""
    from sglang.srt.entrypoints.http_server import app as sglang_app

    [server_info] = [r for r in sglang_app.router.routes if getattr(r, "path", None) == "/server_info"]
    level = getattr(server_info.endpoint, "_auth_level", AuthLevel.NORMAL)

    @app.get("/server_info")
    @auth_level(level)
    def like_server_info():
        return "info"

    add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    client = TestClient(app)
    statuses = {
        name: [client.get(path, headers=bearer(key)).status_code for path in ("/server_info", "/shift/status")]
        for name, key in KEYS.items()
    }
    assert all(info == ours for info, ours in statuses.values())
    assert {name for name, (_, ours) in statuses.items() if ours == 200} == ({"api"} if api_key else set(KEYS))


@pytest.mark.parametrize(("api_key", "admin_api_key"), CONFIGURED)
@pytest.mark.parametrize("key", KEYS.values())
def test_the_page_needs_no_key_and_holds_no_data(app, hub, api_key, admin_api_key, key):
    """A browser opens it without one; then it can ask for it."""
    add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    client = TestClient(app)
    page = client.get("/shift", headers=bearer(key))
    assert page.status_code == 200 and page.content == routes.PAGE.read_bytes()
    assert "content-security-policy" in page.headers and client.head("/shift").status_code == 200


def test_nothing_else_is_opened(app):
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    client = TestClient(app)
    for path in ("/shift/", "/shift/status", "/shift/x", "/shiftx", "//shift", "/SHIFT", "/shift%2f", "/other", "/"):
        assert client.get(path, follow_redirects=False).status_code == 401, path
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/shift").status_code == 401, method


def test_the_page_behind_a_root_path(app):
    add_api_key_middleware(app, api_key="secret", admin_api_key=None)
    client = TestClient(app, root_path="/prefix")
    assert client.get("/prefix/shift").status_code == 200 and client.get("/prefix/shift/status").status_code == 401


def test_the_admin_key_applies_to_policies_by_name(app):
    add_api_key_middleware(app, api_key="secret", admin_api_key="admin")
    client = TestClient(app)
    body = {"server_args": {"shift_policy": "sp"}}
    for key, status in (("secret", 401), ("admin", 200)):
        answer = client.post("/set_internal_state", json=body, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status
    body["server_args"]["shift_policy"] = "no such"
    assert client.post("/set_internal_state", json=body).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_by_name(client, method, name):
    body = {"server_args": {"shift_policy": name, "shift_threshold": 64, "other": 0.5}}
    answer = client.request(method, "/set_internal_state", json=body)
    assert answer.json() == {"shift_policy": POLICIES.index(name), "shift_threshold": 64, "other": 0.5}


def test_an_unknown_name(client):
    answer = client.post("/set_internal_state", json={"server_args": {"shift_policy": "fast" * 100}})
    assert answer.status_code == 400
    assert all(name in answer.json()["detail"] for name in POLICIES) and len(answer.json()["detail"]) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"server_args": []}', b'{"server_args": null}', b"\xff\xfe", b"NaN",
        b'{"server_args": {}}', b'{"server_args": {"shift_policy": 2}}', b'{"server_args": {"shift_policy": true}}',
        b'{"server_args": {"shift_policy": null}}', b'{"server_args": {"shift_policy": ["tp"]}}',
        b'{"server_args": {"shift_threshold": "many"}}', b'{"server_args": {"shift_threshold": 1e3}}',
        b'{"server_args": {"x": 123456789012345678901234567890}}',
    ],
)  # fmt: skip
def test_every_other_body_is_answered_as_by_sglang(app, body):
    client, stock = (TestClient(a, raise_server_exceptions=False) for a in (app, stock_app()))
    for headers in ({"Content-Type": "application/json"}, {}, {"Content-Type": "text/plain"}):
        ours = client.post("/set_internal_state", content=body, headers=headers)
        theirs = stock.post("/set_internal_state", content=body, headers=headers)
        assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)


def test_a_name_in_a_body_that_is_otherwise_wrong(client):
    body = {"server_args": {"shift_policy": "sp", "x": "y"}}
    assert client.post("/set_internal_state", json=body).status_code == 422


START = """
import json, os
from fastapi.testclient import TestClient
from sglang_shift.observe.routes import start
hub = start(2, {"model_name": "demo"})
from sglang.srt.entrypoints.http_server import app

if os.environ.get("TEST_API_KEY"):
    from sglang.srt.utils.auth import add_api_key_middleware
    add_api_key_middleware(app, api_key=os.environ["TEST_API_KEY"], admin_api_key=None)

def ask():
    headers = {"Authorization": "Bearer secret"}
    client = TestClient(app)  # not entered: SGLang's lifespan needs a model
    assert client.get("/shift").status_code == 200
    assert client.get("/shift/status").status_code == (401 if os.environ.get("TEST_API_KEY") else 503)
    client.headers.update(headers)
    name = client.post("/set_internal_state", json={"server_args": {"shift_policy": "fast"}})
    return [client.get("/shift/status").status_code, client.get("/shift").status_code, name.status_code, name.json()]

launcher = ask()
from sglang_shift.observe import http_worker  # as a worker does, which has inherited the environment
assert http_worker.app is app
print(json.dumps([[hub.replicas, len(hub.listeners)], launcher,
                  [http_worker.hub.replicas, len(http_worker.hub.listeners)], ask(),
                  os.environ["SGLANG_HTTP_SERVER_APP_PATH"], os.environ["SGLANG_SHIFT_EVENTS"]]))
"""


@pytest.mark.parametrize("key", ["", "secret"])
def test_in_sglangs_own_app(tmp_path, key):
    """In a process of its own, which also has to end by itself with the hubs running."""
    environment = {k: v for k, v in os.environ.items() if k not in ("SGLANG_SHIFT_EVENTS", routes.APP_VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**environment, "TMPDIR": str(tmp_path), "TEST_API_KEY": key},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    hub, launcher, worker_hub, worker, app_path, endpoint = json.loads(done.stdout.splitlines()[-1])
    assert hub == [2, 1] and worker_hub == [2, 0], "replicas, and listeners: only the launcher feeds the metrics"
    for status, page, unknown, answer in (launcher, worker):
        assert (status, page, unknown) == (503, 200, 400) and "calibrated" in answer["message"]
    assert app_path == "sglang_shift.observe.http_worker:app" and endpoint.startswith("ipc://")


def test_a_body_without_end_is_left_to_sglang():
    """It is deeper than the decoder can go."""
    body = b"[" * 100_000
    assert routes.policy_index(body) is body
