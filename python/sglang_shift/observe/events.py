"""Step events: what the scheduler publishes of every step, for the metrics, the page and whoever subscribes.

Rank 0 of each replica binds a ZMQ PUB socket, sends without waiting, and drops what nobody takes in
time, so watching never slows a step. Messages are two frames: a topic (``step`` or ``state``) and a
MessagePack map of the fields below.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket as stdlib_socket
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import zmq

from sglang_shift.modes import Mode

logger = logging.getLogger(__name__)

SCHEMA = 2
"""Version of the events, and of :meth:`sglang_shift.observe.hub.Hub.snapshot`'s value, which is made of them.

It grows when a field changes its meaning or goes away.
"""

ENDPOINT_VARIABLE = "SGLANG_SHIFT_EVENTS"
"""Environment variable with the endpoint of replica 0; set by the launcher, or by the user before it."""

META_INFO_KEY = "shift_steps"
"""Of a request's steps by mode, on their way into its ``meta_info``."""

FOLDER_PREFIX = "sglang_shift_"
HIGH_WATER_MARK = 4096
"""Messages that wait for one subscriber before newer ones are dropped."""


class Finished(msgspec.Struct):
    """A request that finished in a step. Times are the scheduler's: network and tokenizer not included.

    Attributes:
        prompt_tokens: Length of the prompt.
        output_tokens: Tokens generated.
        ttft: Seconds from its arrival at the scheduler to its first token.
        tpot: Seconds per token after the first; None for a single token.
        e2e: Seconds from its arrival to its end.
        steps: Steps it took part in, by mode.
    """

    prompt_tokens: int
    output_tokens: int
    ttft: float
    tpot: float | None
    e2e: float
    steps: dict[Mode, int]


class StepEvent(msgspec.Struct):
    """One step.

    Attributes:
        time: When its result was processed, Unix seconds.
        step: Its number, from 1, without gaps: a gap means dropped events.
        mode: Its mode.
        phase: ``prefill``, ``decode`` or ``mixed``.
        tokens: Tokens it computed.
        prefill_tokens: New prompt tokens among them.
        running: Requests decoding.
        waiting: Requests waiting.
        pending_tokens: Prompt tokens waiting.
        seconds: How long it took; None where it could not be timed.
        predicted: How long the cost model says it takes in each mode; empty without one.
        switched: The mode is not that of the step before, probes left out.
        reason: Why, for a step that switched or is a probe; else empty.
        exchanged_bytes: Bytes this rank has sent in exchanges since the start.
        exchanges: Exchanges since the start.
        finished: Requests that finished in it.
        replica: Data-parallel replica.
        replayed: Whether it replayed a CUDA graph; None where none are captured for its phase.
    """

    time: float
    step: int
    mode: Mode
    phase: str
    tokens: int
    prefill_tokens: int
    running: int
    waiting: int
    pending_tokens: int
    seconds: float | None = None
    predicted: dict[Mode, float] = {}
    switched: bool = False
    reason: str = ""
    exchanged_bytes: int = 0
    exchanges: int = 0
    finished: list[Finished] = []
    replica: int = 0
    replayed: bool | None = None


class StateEvent(msgspec.Struct):
    """What changes rarely: sent at the start, at every change, and about once a second for late subscribers.

    Attributes:
        time: Unix seconds.
        world_size: P.
        sp_size: S.
        model: What is served.
        policy: Name of the policy.
        policy_text: The policy in words.
        calibration: A :class:`sglang_shift.cost.calibration.Calibration` as JSON, or None without one.
        calibration_text: Where the calibration came from, in words.
        drift: By mode, the median of actual over predicted step time of late; None before it is known.
        weight_bytes: Bytes of weights on this rank.
        weight_bytes_beyond_base: Of these, bytes beyond the base configuration's.
        steps: Steps by mode since the start.
        tokens: Tokens by mode since the start.
        switches: Changes of mode since the start.
        running: Requests decoding.
        waiting: Requests waiting.
        replica: Data-parallel replica.
        schema: :data:`SCHEMA` of the sender.
    """

    time: float
    world_size: int
    sp_size: int
    model: str
    policy: str
    policy_text: str
    calibration: dict[str, Any] | None
    calibration_text: str
    drift: dict[Mode, float | None]
    weight_bytes: int
    weight_bytes_beyond_base: int
    steps: dict[Mode, int]
    tokens: dict[Mode, int]
    switches: int
    running: int = 0
    waiting: int = 0
    replica: int = 0
    schema: int = SCHEMA


_TOPICS: dict[bytes, type[StepEvent] | type[StateEvent]] = {b"step": StepEvent, b"state": StateEvent}


_made: Path | None = None
"""The folder that :func:`prepare_endpoint` made in this process."""


def prepare_endpoint(replicas: int = 1) -> str | None:
    """Choose the endpoint, once, in the launcher: a socket file that only this user can reach.

    Kept in the environment, where the ranks and HTTP workers that it starts find it. One that the user named
    stays if every replica can publish there. Where none is to be had, there are no events, and the log says why.
    """
    global _made
    problems = []
    if named := os.environ.get(ENDPOINT_VARIABLE):
        if not (problem := _problem(named, replicas)):
            return named
        problems.append(f"{named}: {problem}")
    else:
        for parent in (None, "/tmp", "/dev/shm"):  # None: by TMPDIR
            try:
                folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
            except OSError as error:
                problems.append(f"{parent or 'TMPDIR'}: {error.strerror}")
                continue
            if not (problem := _problem(f"ipc://{folder}/events", replicas)):
                _made, os.environ[ENDPOINT_VARIABLE] = folder, f"ipc://{folder}/events"
                return os.environ[ENDPOINT_VARIABLE]
            shutil.rmtree(folder, ignore_errors=True)
            problems.append(f"{folder}: {problem}")
    os.environ[ENDPOINT_VARIABLE] = ""
    logger.warning("sglang_shift: no events, so the page, its data and our metrics are empty (%s)", "; ".join(problems))
    return None


def _problem(endpoint: str, replicas: int) -> str:
    """Why not every replica can publish at ``endpoint``; empty if each can."""
    with zmq.Context() as context:  # its end waits until the sockets are closed, and the ports free again
        for replica in range(replicas):
            try:
                with context.socket(zmq.PUB) as socket:
                    _bind(socket, _endpoint(endpoint, replica))
            except (zmq.ZMQError, ValueError, OSError) as error:
                return str(error)
    return ""


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Bind, but take nothing away: ZMQ replaces whatever is at the path of a socket file.

    Raises:
        zmq.ZMQError: it cannot.
        OSError: something is there: a file, or a socket that somebody listens to.
        ValueError: there is no such endpoint.
    """
    path = endpoint.removeprefix("ipc://")
    if path != endpoint and os.path.lexists(path):
        if not Path(path).is_socket():
            raise FileExistsError(f"{path} is there and is no socket")
        with contextlib.suppress(ConnectionRefusedError), stdlib_socket.socket(stdlib_socket.AF_UNIX) as other:
            other.connect(path)
            raise FileExistsError(f"{path} is in use")
    socket.bind(endpoint)


def remove_endpoint() -> None:
    """Remove the folder that :func:`prepare_endpoint` made, if it did."""
    if _made is not None:
        shutil.rmtree(_made, ignore_errors=True)


def endpoint_of(replica: int) -> str | None:
    """Where a replica publishes, or None where nobody asked for events (the offline engine).

    Raises:
        ValueError: the environment's endpoint is a TCP one without a port.
    """
    first = os.environ.get(ENDPOINT_VARIABLE)
    return _endpoint(first, replica) if first else None


def _endpoint(first: str, replica: int) -> str:
    if replica == 0:
        return first
    if first.startswith("tcp://"):
        host, _, port = first.rpartition(":")
        return f"{host}:{int(port) + replica}"
    return f"{first}.{replica}"


class Publisher:
    """The PUB socket of one replica. All methods return at once, and none of them raises.

    Args:
        replica: Data-parallel replica.
    """

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self._encoder = msgspec.msgpack.Encoder()
        self._socket: zmq.Socket[bytes] | None = None
        try:
            if endpoint := endpoint_of(replica):
                self._socket = zmq.Context.instance().socket(zmq.PUB)
                self._socket.set_hwm(HIGH_WATER_MARK)
                self._socket.setsockopt(zmq.LINGER, 0)
                _bind(self._socket, endpoint)
        except Exception as error:
            self._give_up(error)

    def send(self, event: StepEvent | StateEvent) -> None:
        """Publish ``event`` if anybody could listen. For a subscriber that is too slow, ZMQ drops it."""
        if self._socket is not None:
            topic = b"step" if isinstance(event, StepEvent) else b"state"
            try:
                self._socket.send_multipart([topic, self._encoder.encode(event)], zmq.NOBLOCK)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Observing must not end a server."""
        logger.warning("sglang_shift: no more events of replica %s (%s)", self.replica, error)
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Subscriber:
    """Receives the events of all replicas.

    Args:
        replicas: How many there are.
        timeout_ms: How long :meth:`receive` waits.
    """

    def __init__(self, replicas: int = 1, timeout_ms: int = 500) -> None:
        self._decoders = {topic: msgspec.msgpack.Decoder(kind) for topic, kind in _TOPICS.items()}
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.set_hwm(HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
        self._socket.subscribe(b"")
        for replica in range(replicas):
            try:
                if endpoint := endpoint_of(replica):
                    # Where a publisher listens on all addresses, this machine's own is one.
                    self._socket.connect(endpoint.replace("tcp://*:", "tcp://127.0.0.1:"))
            except (zmq.ZMQError, ValueError) as error:
                logger.warning("sglang_shift: no events of replica %s (%s)", replica, error)

    def receive(self) -> StepEvent | StateEvent | None:
        """The next event; None if there was none in time.

        Raises:
            zmq.ZMQError: the socket was closed.
        """
        try:
            topic, payload = self._socket.recv_multipart()
        except zmq.Again:
            return None
        return self._decoders[topic].decode(payload)

    def close(self) -> None:
        """Close the socket; :meth:`receive` in another thread then raises."""
        self._socket.close()
