"""Lets a rank wait until the detokenizer has read all that this rank has sent.

If a request gets another leader, its next tokens reach the detokenizer over another socket. ZMQ keeps the order of the
messages of one socket, but not of two. So the old leader asks for a receipt before the level changes. The receipt comes
after all messages before it were read.
"""

from __future__ import annotations

import time
from typing import Any

import zmq
from sglang.srt.managers.io_struct import BaseReq, sock_recv, sock_send, wrap_as_pickle
from sglang.srt.utils.network import get_zmq_socket

PATIENCE_S = 10.0
"""The seconds after which a rank no longer waits for a receipt."""

ROUTED = "sglang_shift.receipt"
"""The id by which a router of several detokenizers sends requests for receipts to one of them."""


class ReceiptReq(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """A rank asks the detokenizer for a receipt.

    Attributes:
        address: Where the receipt goes.
        number: What the receipt has.
    """

    address: str
    number: int


class ReceiptReader:
    """Asks for receipts, and waits for them.

    Args:
        output: The socket of this rank to the detokenizer.
        address: The address of a socket for the receipts.

    Attributes:
        due: Whether this rank has sent something since the last receipt.
    """

    def __init__(self, output: Any, address: str) -> None:
        self.output, self.address = output, address
        self.receipts = get_zmq_socket(zmq.Context.instance(), zmq.PULL, address, True)
        self.number, self.due = 0, False

    def wait(self) -> None:
        """Wait until all that this rank has sent was read. If it has sent nothing, there may be no detokenizer yet.

        Raises:
            TimeoutError: it takes longer than :data:`PATIENCE_S`.
        """
        if not self.due:
            return
        self.number += 1
        request = ReceiptReq(rid=ROUTED, address=self.address, number=self.number)
        sock_send(self.output, wrap_as_pickle(request))
        end = time.monotonic() + PATIENCE_S
        while (left := end - time.monotonic()) > 0:
            if self.receipts.poll(int(1000 * left) + 1) and sock_recv(self.receipts) == self.number:
                self.due = False
                return
        raise TimeoutError(f"the detokenizer is more than {PATIENCE_S:.0f} s behind")


class ReceiptWriter:
    """Gives receipts, in the process that reads what ranks send."""

    def __init__(self) -> None:
        self.sockets: dict[str, Any] = {}

    def write(self, request: ReceiptReq) -> None:
        """Say that all messages before this request were read."""
        if (socket := self.sockets.get(request.address)) is None:
            socket = get_zmq_socket(zmq.Context.instance(), zmq.PUSH, request.address, False)
            self.sockets[request.address] = socket
        sock_send(socket, request.number)
