"""The sockets of the events: whatever is wrong with them, the server goes on."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import zmq
from sglang_shift.observe import events, routes
from sglang_shift.observe.events import Publisher, StateEvent, Subscriber, prepare_endpoint, remove_endpoint
from sglang_shift.observe.hub import Hub
from sglang_shift.tools.servers import free_port


def state(**changes) -> StateEvent:
    values = {"model": "demo", "policy": "tokens", "policy_text": "", "calibration": None, "calibration_text": ""}
    counts = {"weight_bytes": 1, "weight_bytes_beyond_base": 0, "switches": 0}
    return StateEvent(
        time=time.time(), world_size=2, sp_size=2, drift={}, steps={}, tokens={}, **{**values, **counts, **changes}
    )


def heard(replicas: int = 1, publishers: list[Publisher] | None = None, seconds: float = 10) -> set[int]:
    """The replicas whose events arrive."""
    subscriber = Subscriber(replicas, timeout_ms=50)
    publishers = publishers or [Publisher(replica) for replica in range(replicas)]
    found: set[int] = set()
    try:
        deadline = time.monotonic() + seconds
        while len(found) < replicas and time.monotonic() < deadline:
            for publisher in publishers:
                publisher.send(state(replica=publisher.replica))
            while event := subscriber.receive():
                found.add(event.replica)
    finally:
        subscriber.close()
        for publisher in publishers:
            if publisher._socket is not None:
                publisher._socket.close()
    return found


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv(events.ENDPOINT_VARIABLE, raising=False)
    monkeypatch.setattr(events, "_endpoint_folder", None, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    remove_endpoint()
    events._endpoint_folder = None


@pytest.fixture
def name(monkeypatch):
    return lambda endpoint: monkeypatch.setenv(events.ENDPOINT_VARIABLE, endpoint)


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free."""
    while True:
        port = free_port()
        with ExitStack() as stack, suppress(OSError):
            for other in range(port, port + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", other))
            return port


# Where the sockets are by default


@pytest.mark.parametrize("length", [70, 79, 80, 90, 107, 120, 200])
def test_a_temporary_folder_with_a_long_name(tmp_path, monkeypatch, length):
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    folder = parent / ("x" * (length - len(str(parent)) - 1))
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    try:
        endpoint = prepare_endpoint(11)
        assert endpoint and os.environ[events.ENDPOINT_VARIABLE] == endpoint
        assert heard(11) == set(range(11))
        made = Path(endpoint.removeprefix("ipc://")).parent
        assert made.stat().st_mode & 0o077 == 0, "nobody else may listen"
        remove_endpoint()
        assert not made.exists() and list(folder.iterdir()) == []
    finally:
        shutil.rmtree(parent)


@pytest.mark.parametrize("kind", ["missing", "file", "bytes", "relative"])
def test_a_strange_temporary_folder(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("")
    strange = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(strange)
    (tmp_path / "relative").mkdir()
    monkeypatch.chdir(tmp_path)
    name = {"missing": str(tmp_path / "missing"), "file": str(tmp_path / "file"), "bytes": os.fsdecode(strange)}
    monkeypatch.setenv("TMPDIR", name.get(kind, "relative"))
    assert prepare_endpoint() and heard() == {0}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_temporary_folder_that_cannot_be_written(tmp_path):
    code = (
        "import os; os.setgid(65534); os.setuid(65534); "
        "from sglang_shift.observe.events import *; import sys; print(prepare_endpoint()); remove_endpoint()"
    )
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/",
        env={**os.environ, "TMPDIR": str(folder), events.ENDPOINT_VARIABLE: ""},
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("another user cannot read this installation")
    assert done.returncode == 0 and done.stdout.startswith("ipc:///"), done.stderr


def test_no_folder_at_all_means_no_events(monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with caplog.at_level(logging.WARNING):
        assert prepare_endpoint() is None
    [line] = caplog.messages
    assert "no events" in line and "No space left on device" in line
    assert events.endpoint_of(0) is None
    publisher, hub = Publisher(0), Hub()
    publisher.send(state())
    hub.start()
    hub.stop()
    assert publisher._socket is None and len(caplog.messages) == 1


def test_what_the_user_named_is_not_removed(tmp_path, name):
    """Though its folder is named as ours are."""
    folder = tmp_path / (events.FOLDER_PREFIX + "data")
    folder.mkdir()
    (folder / "precious").write_text("x")
    name(f"ipc://{folder}/events")
    assert prepare_endpoint() == f"ipc://{folder}/events"
    remove_endpoint()
    assert (folder / "precious").exists()


# Endpoints that the user named


def assert_served_without_events(caplog, replicas: int = 1) -> None:
    """In the launcher, in each replica's first rank, in the hub; also if it is so only after the launcher looked."""
    named = os.environ[events.ENDPOINT_VARIABLE]
    with caplog.at_level(logging.WARNING):
        assert prepare_endpoint(replicas) is None
        [line] = caplog.messages
        assert "no events" in line and named in line and "\n" not in line
        hub = Hub(replicas)
        hub.start()
        hub.stop()
        assert [Publisher(replica)._socket for replica in range(replicas)] == [None] * replicas
        assert len(caplog.messages) == 1
        os.environ[events.ENDPOINT_VARIABLE] = named
        publishers = [Publisher(replica) for replica in range(replicas)]
        for publisher in publishers:
            publisher.send(state())
        assert any(p._socket is None for p in publishers) and len(caplog.messages) > 1
        hub = Hub(replicas)
        hub.start()
        hub.stop()
    for publisher in publishers:
        if publisher._socket is not None:
            publisher._socket.close()


@pytest.mark.parametrize("replica", [0, 1])
def test_a_port_in_use(name, caplog, replica):
    port = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + replica))
        taken.listen()
        name(f"tcp://127.0.0.1:{port}")
        assert_served_without_events(caplog, 2)


def test_the_events_of_another_server_are_not_taken_for_ours(name, tmp_path):
    for endpoint in (f"tcp://127.0.0.1:{free_ports(1)}", f"ipc://{tmp_path}/events"):
        name(endpoint)
        other = Publisher(0)
        assert prepare_endpoint() is None
        assert heard(publishers=[other, Publisher(0)], seconds=0.5) == set(), "our hub must not hear the other server"


@pytest.mark.parametrize("count", [1, 2])
def test_two_servers_with_one_socket_file(name, tmp_path, count):
    """The second does not take it from the first, though ZMQ would."""
    name(f"ipc://{tmp_path}/events")
    first = Publisher(0)
    assert [Publisher(0)._socket for _ in range(count)] == [None] * count
    assert heard(publishers=[first]) == {0}


@pytest.mark.parametrize(
    "endpoint",
    [
        "nonsense", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "tcp://203.0.113.7:5800", "http://127.0.0.1:5800",
        "ipc:///no/such/folder/events", "ipc:///proc/events", "ipc:///tmp/" + "x" * 120, "ipc:///tmp", "ipc://",
        pytest.param("ipc:///tmp/\udcff", id="no UTF-8"),  # pytest-xdist cannot send this text as a name
    ],
)  # fmt: skip
def test_an_endpoint_that_is_none(name, caplog, endpoint):
    name(endpoint)
    assert_served_without_events(caplog)


def test_a_second_replica_without_a_port(name, caplog):
    for endpoint in ("tcp://127.0.0.1:65535", "tcp://127.0.0.1:*"):
        name(endpoint)
        caplog.clear()
        assert_served_without_events(caplog, 2)


def test_a_stale_socket_is_replaced(tmp_path, name):
    path = tmp_path / "events"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert path.is_socket()
    name(f"ipc://{path}")
    assert prepare_endpoint() == f"ipc://{path}" and heard() == {0}


def test_a_file_is_not_replaced(tmp_path, name, caplog):
    path = tmp_path / "precious"
    path.write_text("x")
    name(f"ipc://{path}")
    assert_served_without_events(caplog)
    assert path.read_text() == "x"


def test_every_address(name):
    name(f"tcp://*:{free_ports(2)}")
    assert prepare_endpoint(2) and heard(2) == {0, 1}


# While serving


@pytest.mark.parametrize("wrong", [{"model": "\udcff"}, {"switches": 1 << 70}])
def test_an_event_that_cannot_be_sent_ends_the_events_only(tmp_path, name, caplog, wrong):
    name(f"ipc://{tmp_path}/events")
    publisher = Publisher(0)
    with caplog.at_level(logging.WARNING):
        publisher.send(state(**wrong))
        publisher.send(state())
    assert len(caplog.messages) == 1 and "no more events of replica 0" in caplog.text


def test_a_socket_that_fails_ends_the_events_only(tmp_path, name, caplog, monkeypatch):
    name(f"ipc://{tmp_path}/events")

    def no_more(*args):
        raise zmq.ZMQError(24, "Too many open files")

    with caplog.at_level(logging.WARNING):
        publisher = Publisher(0)
        publisher._socket.close()
        publisher.send(state())
        monkeypatch.setattr(zmq.Context, "socket", no_more)
        Publisher(0).send(state())
    assert len(caplog.messages) == 2


def test_the_page_says_where_to_look():
    assert "log" in routes.NOT_READY
