"""Servers whose observing meets trouble: they serve all the same."""

from __future__ import annotations

import socket
import time

import pytest
import requests

pytestmark = [pytest.mark.server, pytest.mark.full]

SHIFT = ("--tp-size", "2", "--enable-shift-parallel", "--shift-threshold", "8")
BODY = {"input_ids": list(range(50, 70)), "sampling_params": {"max_new_tokens": 4, "temperature": 0}}


def status(server, seconds: float = 20, **options) -> requests.Response:
    """The page's data, once the first state has arrived."""
    deadline = time.monotonic() + seconds
    while True:
        answer = requests.get(server.url + "/shift/status", timeout=10, **options)
        if answer.status_code != 503 or time.monotonic() > deadline:
            return answer
        time.sleep(0.2)


def test_a_long_temporary_folder_and_an_api_key(servers, tmp_path):
    folder = tmp_path / ("x" * (84 - len(str(tmp_path))))  # SGLang's own socket files still fit
    folder.mkdir()
    server = servers.get(*SHIFT, "--api-key", "secret", "--admin-api-key", "admin", env={"TMPDIR": str(folder)})
    headers = {"Authorization": "Bearer secret"}
    assert requests.post(server.url + "/generate", json=BODY, timeout=60).status_code == 401
    assert requests.post(server.url + "/generate", json=BODY, headers=headers, timeout=60).status_code == 200
    assert requests.get(server.url + "/shift", timeout=10).status_code == 200
    for path in ("/shift/status", "/server_info"):
        for key, expected in ((None, 401), ("admin", 401), ("secret", 200)):
            given = {} if key is None else {"Authorization": f"Bearer {key}"}
            answer = requests.get(server.url + path, headers=given, timeout=30)
            assert answer.status_code == expected or (path == "/shift/status" and answer.status_code == 503)
    assert status(server, headers=headers).json()["totals"]["steps"].keys() == {"tp", "sp"}
    assert "File name too long" not in server.tail(100_000)


def test_a_port_in_use_and_several_tokenizer_workers(servers):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        server = servers.get(*SHIFT, "--tokenizer-worker-num", "2", env={"SGLANG_SHIFT_EVENTS": endpoint})
        assert requests.post(server.url + "/generate", json=BODY, timeout=60).status_code == 200
        assert requests.get(server.url + "/shift", timeout=10).status_code == 200
        answer = status(server, 3)
        assert answer.status_code == 503 and "log" in answer.json()["error"]
        assert server.tail(100_000).count("sglang_shift: no events") == 1
    servers.stop()
