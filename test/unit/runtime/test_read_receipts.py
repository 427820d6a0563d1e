"""A rank waits until the detokenizer has read its messages."""

from __future__ import annotations

import threading

import pytest
import zmq
from sglang.srt.managers.io_struct import sock_recv
from sglang_shift.runtime import read_receipts
from sglang_shift.runtime.read_receipts import ReceiptReader, ReceiptReq, ReceiptWriter


@pytest.fixture
def ends(tmp_path):
    """The detokenizer's end of a socket, and what a rank has."""
    pull, push = zmq.Context.instance().socket(zmq.PULL), zmq.Context.instance().socket(zmq.PUSH)
    pull.bind(f"ipc://{tmp_path}/outputs")
    push.connect(f"ipc://{tmp_path}/outputs")
    reader = ReceiptReader(push, f"ipc://{tmp_path}/receipts")
    yield pull, reader
    for socket in (pull, push, reader.receipts):
        socket.close(linger=0)


def test_nothing_is_asked_before_something_was_sent(ends):
    outputs, reader = ends
    reader.wait()
    assert not outputs.poll(50)


def test_a_receipt_that_comes_too_late_is_not_taken_for_a_later_one(ends, monkeypatch):
    outputs, reader = ends
    monkeypatch.setattr(read_receipts, "PATIENCE_S", 0.1)
    reader.due = True
    with pytest.raises(TimeoutError, match="the detokenizer is more than"):
        reader.wait()
    assert reader.due, "it may still have much to read"
    late = sock_recv(outputs)
    assert isinstance(late, ReceiptReq) and late.number == 1

    monkeypatch.setattr(read_receipts, "PATIENCE_S", 60.0)
    writer = ReceiptWriter()
    writer.write(late)

    def detokenizer() -> None:
        writer.write(sock_recv(outputs))

    thread = threading.Thread(target=detokenizer)
    thread.start()
    reader.wait()
    thread.join()
    assert not reader.due and reader.number == 2
    for socket in writer.sockets.values():
        socket.close(linger=0)
