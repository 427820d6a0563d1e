"""Defines step events. The scheduler publishes one for every step, for the metrics, the page and other programs.

Rank 0 of each replica binds a ZMQ PUB socket and sends without waiting. Events that no subscriber reads in time are
dropped, so watching never slows a step. A message has two frames: a topic (``step``, ``state`` or ``instances``), and a
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
"""Version of the events, and of the value of :meth:`sglang_shift.observe.hub.Hub.snapshot`, which is made of them.

It grows when a field changes its meaning or is removed.
"""

ENDPOINT_VARIABLE = "SGLANG_SHIFT_EVENTS"
"""Environment variable with the endpoint of replica 0. The launcher sets it, if the user has not set it before."""

META_INFO_KEY = "shift_steps"
"""Key of a request's steps by mode, on their way into its ``meta_info``."""
SPARSE_KEY = "shift_sparse"
"""Key of what a request left out, on its way into its ``meta_info``."""

FOLDER_PREFIX = "sglang_shift_"
HIGH_WATER_MARK = 4096
"""Messages that wait for one subscriber before newer ones are dropped."""


class SparseFigures(msgspec.Struct):
    """What the chunks of a request left out under ``--shift-sparse-prefill``.

    A query is one head of one token in one layer. Its dropped mass is the share of its softmax that it left out.

    Attributes:
        tokens: The prompt tokens that were computed sparsely. The other figures are of these tokens.
        mean: The mean dropped mass.
        p99: A mass that 99 % of the queries do not exceed.
        max: The largest dropped mass.
        computed: The share of the pairs of a query and a key whose value was used.
        exact: Why its other chunks are exact; empty if they are not, or if their prefix is short.
    """

    tokens: int
    mean: float
    p99: float
    max: float
    computed: float
    exact: str = ""


class Finished(msgspec.Struct):
    """A request that finished in a step. Times are the scheduler's: they do not include network and tokenizer.

    Attributes:
        prompt_tokens: Length of the prompt.
        output_tokens: Number of generated tokens.
        ttft: Seconds from its arrival at the scheduler to its first token.
        tpot: Seconds per token after the first token; None if there is only one token.
        e2e: Seconds from its arrival to its end.
        steps: Number of steps that computed tokens of it, by mode.
        sparse: What its chunks left out; None without ``--shift-sparse-prefill``.
    """

    prompt_tokens: int
    output_tokens: int
    ttft: float
    tpot: float | None
    e2e: float
    steps: dict[Mode, int]
    sparse: SparseFigures | None = None


class StepEvent(msgspec.Struct):
    """One step.

    Attributes:
        time: Time at which its result was processed, Unix seconds.
        step: Number of the step, from 1, without gaps. A gap means that events were dropped.
        mode: The mode of the step.
        phase: ``prefill``, ``decode`` or ``mixed``.
        tokens: Tokens that the step computed.
        prefill_tokens: New prompt tokens among these tokens.
        running: Number of requests that decode.
        waiting: Number of requests that wait.
        pending_tokens: Number of prompt tokens that wait.
        seconds: Seconds that the step took; None if they could not be measured.
        predicted: Seconds that the cost model predicts, by mode; empty without a cost model.
        switched: Whether the policy chose another mode than for the step before. Probes do not count.
        reason: The reason for the mode, if the step switched, is a probe, or must run in TP; else empty.
        exchanged_bytes: Bytes that this rank has sent in exchanges since the start.
        exchanges: Number of exchanges since the start.
        finished: Requests that finished in the step.
        replica: Number of the data-parallel replica.
        replayed: Whether the step replayed a CUDA graph; None if no graphs are captured for its phase.
        chunk_room: Prompt tokens that the step could take under ``--shift-tbt-target``; None if no bound applies to it.
        chunk_budget: Seconds that its prompts could take under that bound; None like ``chunk_room``.
        gaps: The gaps between tokens that end with the step: pairs of seconds and the number of requests.
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
    chunk_room: int | None = None
    chunk_budget: float | None = None
    gaps: list[tuple[float, int]] = []


class StateEvent(msgspec.Struct):
    """State that changes rarely. It is sent at the start, at every change, and about once a second.

    A subscriber that starts late gets it within about a second.

    Attributes:
        time: Unix seconds.
        world_size: P.
        sp_size: S.
        model: Name of the model.
        policy: Name of the policy.
        policy_text: The policy's description of itself.
        calibration: A :class:`sglang_shift.cost.calibration.Calibration` as JSON, or None without a calibration.
        calibration_text: A sentence about the source of the calibration.
        drift: By mode, the median of actual over predicted time of recent steps; None before it is known.
        weight_bytes: Bytes of weights on this rank.
        weight_bytes_beyond_base: Part of these bytes that the base configuration does not have.
        steps: Number of steps since the start, by mode.
        tokens: Number of tokens since the start, by mode.
        switches: Changes of mode since the start.
        running: Number of requests that decode.
        waiting: Number of requests that wait.
        replica: Number of the data-parallel replica.
        tbt_target: The bound on the gap between tokens in seconds; 0 for none.
        tbt_margin: The share of the bound that predicted times may use.
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
    tbt_target: float = 0.0
    tbt_margin: float = 1.0
    schema: int = SCHEMA


class InstancesEvent(msgspec.Struct):
    """The instances of a server with ``--instances``. Their controller sends it after each change, and once a second.

    Attributes:
        time: Unix seconds.
        levels: The numbers of ranks that an instance may have.
        epoch: Number of the last change.
        instances: For each instance its ``first`` rank, its ``level``, its ``requests``, the ``tokens`` that they need
            and its ``capacity`` in tokens.
        last: The last changes, oldest first: the fields of ``LevelChanged``, a ``time``, and ``why``.
        replica: The controller's number among the senders of events: the number of ranks.
        policy: The ``name`` of the policy. ``auto`` adds the ``reason`` of its last choice, its ``predictions`` for
            each layout (``loss`` and ``seconds``), the ``demand`` by classes of requests, and its ``dwell`` time.
    """

    time: float
    levels: list[int]
    epoch: int
    instances: list[dict[str, int]]
    last: list[dict[str, Any]]
    replica: int
    policy: dict[str, Any] = {}


Event = StepEvent | StateEvent | InstancesEvent
_TOPICS: dict[bytes, type[Event]] = {b"step": StepEvent, b"state": StateEvent, b"instances": InstancesEvent}
_TOPIC_OF = {kind: topic for topic, kind in _TOPICS.items()}


_endpoint_folder: Path | None = None
"""The folder that :func:`prepare_endpoint` made in this process."""


def prepare_endpoint(replicas: int = 1) -> str | None:
    """Choose the endpoint of the events. The launcher calls this once.

    The endpoint is a socket file that only this user can reach. It is stored in the environment, for the ranks and HTTP
    workers that the launcher starts. An endpoint that the user named is kept, if every replica can publish there. If no
    endpoint can be used, there are no events, and the log says why.
    """
    global _endpoint_folder
    problems = []
    if named := os.environ.get(ENDPOINT_VARIABLE):
        if not (problem := _binding_problem(named, replicas)):
            return named
        problems.append(f"{named}: {problem}")
    else:
        for parent in (None, "/tmp", "/dev/shm"):  # None: by TMPDIR
            try:
                folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
            except OSError as error:
                problems.append(f"{parent or 'TMPDIR'}: {error.strerror}")
                continue
            if not (problem := _binding_problem(f"ipc://{folder}/events", replicas)):
                _endpoint_folder, os.environ[ENDPOINT_VARIABLE] = folder, f"ipc://{folder}/events"
                return os.environ[ENDPOINT_VARIABLE]
            shutil.rmtree(folder, ignore_errors=True)
            problems.append(f"{folder}: {problem}")
    os.environ[ENDPOINT_VARIABLE] = ""
    logger.warning("sglang_shift: no events, so the page, its data and our metrics are empty (%s)", "; ".join(problems))
    return None


def _binding_problem(endpoint: str, replicas: int) -> str:
    """Return why some replica cannot publish at ``endpoint``; empty if each replica can."""
    with zmq.Context() as context:  # its end waits until the sockets are closed, so the ports are free again
        for replica in range(replicas):
            try:
                with context.socket(zmq.PUB) as socket:
                    _bind(socket, _endpoint(endpoint, replica))
            except (zmq.ZMQError, ValueError, OSError) as error:
                return str(error)
    return ""


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Bind a socket, but never replace a file. ZMQ would replace any file at the path of a socket.

    Raises:
        zmq.ZMQError: the socket cannot be bound.
        OSError: a file is at the path, or a socket that somebody listens to.
        ValueError: the endpoint does not exist.
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
    """Remove the folder that :func:`prepare_endpoint` made, if it made one."""
    if _endpoint_folder is not None:
        shutil.rmtree(_endpoint_folder, ignore_errors=True)


def endpoint_of(replica: int) -> str | None:
    """Return the endpoint of a replica, or None if nobody asked for events (the offline engine).

    Raises:
        ValueError: the environment has a TCP endpoint without a port.
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

    def send(self, event: Event) -> None:
        """Publish ``event`` if there is a socket. If a subscriber is too slow, ZMQ drops the event for it."""
        if self._socket is not None:
            try:
                self._socket.send_multipart([_TOPIC_OF[type(event)], self._encoder.encode(event)], zmq.NOBLOCK)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Close the socket. A failure to observe must not end the server."""
        logger.warning("sglang_shift: no more events of replica %s (%s)", self.replica, error)
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Subscriber:
    """Receives the events of all replicas.

    Args:
        replicas: Number of replicas.
        timeout_ms: Milliseconds that :meth:`receive` waits.
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
                    # If a publisher listens on all addresses, it also listens on this machine's own address.
                    self._socket.connect(endpoint.replace("tcp://*:", "tcp://127.0.0.1:"))
            except (zmq.ZMQError, ValueError) as error:
                logger.warning("sglang_shift: no events of replica %s (%s)", replica, error)

    def receive(self) -> Event | None:
        """Return the next event, or None if none arrives in time.

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
