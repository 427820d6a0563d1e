"""A server whose modes differ does not start, and says where they differ first."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import TWO_RANKS, Server, surviving_processes

SUPPORT = Path(__file__).resolve().parents[1] / "support"
REFUSED = "does not compute the same in SP as in TP on this machine"


@pytest.fixture
def no_server(servers):
    servers.stop()


@pytest.mark.server
@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "layer"),
    [("weight", "model.layers.1.self_attn.attn"), ("last_mlp", "the layers after the last attention")],
)
def test_a_small_fault_is_found_in_its_layer(no_server, fault, layer):
    server = Server(list(TWO_RANKS), [str(SUPPORT / "faulty_server.py")], {"FAULT": fault}, forked=True)
    try:
        assert server.process.wait(300) != 0
        log = server.tail(1_000_000)
        assert REFUSED in log and f"the first difference is at {layer};" in log
        assert not surviving_processes(server.process.pid)
    finally:
        server.stop()


@pytest.mark.server
@pytest.mark.full
def test_without_the_check_it_starts(servers):
    module = [str(SUPPORT / "faulty_server.py")]
    server = servers.get(*TWO_RANKS, "--shift-check", "off", module=module, env={"FAULT": "last_mlp"})
    assert server.generate([5, 6, 7], 2).tokens
    assert REFUSED not in server.tail(1_000_000)
    servers.stop()
