"""Keeps the results of a benchmark on disk: one line of JSON for each visit of a contender by a workload."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from sglang_shift.modes import Mode

USUAL = ("single", "saturated", "rate", "bursty", "long-mix", "long-prompts")
"""The kinds of workload that are sent unless the user names some."""
MADE_UP = (*USUAL, "closed-loop", "mixed-lengths", "day")
TRACES = ("azure", "mooncake")
KINDS = MADE_UP + TRACES
"""The kinds of workload, in the order of reports."""


class RequestRecord(msgspec.Struct, frozen=True):
    """One request as the client saw it. Times are in seconds.

    Attributes:
        due: When the request had to be sent, from the start of the visit.
        sent: When the request was sent, from the start of the visit.
        ttft: Time from sending to the first token.
        latency: Time from sending to the last token.
        itl: Times between the tokens, ``output - 1`` values. Tokens that came together share their time.
        deliveries: Times between deliveries of tokens, if tokens came together. It is empty if each came alone.
        prompt: Number of prompt tokens.
        output: Number of tokens that the server generated.
        cached: Number of prompt tokens in the server's prefix cache; 0 if the server does not say.
        error: What went wrong; empty if nothing went wrong. After an error, only the fields ``due``, ``rejected``,
            ``unfinished`` and ``group`` have a meaning.
        rejected: Whether the server refused the request (status 400), such as one that is too long for it.
        unfinished: Whether the workload ended before the request did.
        group: The name of the requests that are like this one, such as ``long``; empty if there are no groups.
    """

    due: float
    sent: float
    ttft: float
    latency: float
    itl: list[float]
    prompt: int
    output: int
    cached: int = 0
    error: str = ""
    deliveries: list[float] = msgspec.field(default_factory=list)
    rejected: bool = False
    unfinished: bool = False
    group: str = ""

    @property
    def failed(self) -> bool:
        """Whether the request failed, although the server neither refused it nor ran out of time."""
        return bool(self.error) and not (self.rejected or self.unfinished)

    @property
    def gaps(self) -> list[float]:
        """The times for which a reader of the stream saw nothing new, after the first token."""
        return self.deliveries or self.itl

    @property
    def end(self) -> float:
        """When the last token came, from the start of the visit."""
        return self.sent + self.latency

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first token. It is None if there is only one token."""
        return (self.latency - self.ttft) / (self.output - 1) if self.output > 1 else None


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The server's state at a moment. If a server does not report a value, it is None.

    Attributes:
        time: Seconds from the start of the visit.
        running: Requests in the running batch.
        waiting: Requests in the queue.
        kv_usage: Share of the KV pool in use, 0 to 1.
        steps: Steps since the start of the visit, by mode; empty if the server has no modes.
        levels: Ranks at each level of instances; empty if the server has no instances.
    """

    time: float
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    steps: dict[Mode, int] = msgspec.field(default_factory=dict)
    levels: dict[int, int] = msgspec.field(default_factory=dict)


class InstanceChange(msgspec.Struct, frozen=True):
    """A merge or split of instances, as the server reports it. docs/instances.md explains the fields.

    Attributes:
        epoch: The number of the change.
        first: The first rank that changed.
        ranks: Number of ranks that changed.
        level: The ranks of each instance afterwards.
        ok: Whether the change was made.
        phases: Seconds of each phase.
        bytes_sent: Bytes of KV cache that the ranks sent.
        tokens_recomputed: Tokens of running requests that had to be computed again.
    """

    epoch: int
    first: int
    ranks: int
    level: int
    ok: bool
    phases: dict[str, float]
    bytes_sent: int = 0
    tokens_recomputed: int = 0

    @property
    def merges(self) -> bool:
        """Whether instances merged; if not, one split."""
        return self.level == self.ranks


class Visit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One workload, sent to one contender once.

    Attributes:
        contender: The name of the contender.
        workload: The name of the workload, such as ``rate 2.0/s``.
        kind: One of :data:`KINDS`.
        x: The value on the axis of a plot over workloads of this kind: prompt tokens for ``single``, and requests per
            second for ``rate``. It is None for other kinds.
        round: The number of the round, from 1.
        seconds: Seconds from the sending of the first request to the last token; 0 if no request was answered.
        requests: The requests in the order in which they were due, without the warm-up.
        samples: The samples in the order of their times.
        shift: Changes of our servers' counters over the visit: ``tp_steps`` and so on for each mode, ``switches``,
            ``exchanged_bytes`` and ``exchanges``. It is None for other servers.
        started: Local time of the start, in ISO 8601.
        load_average: Load average of the machine over the minute before.
        window: Begin and end of the steady window, in seconds from the start of the visit. Throughput is taken in it,
            so neither the first requests nor the end of the last replica count. None means no window.
        changes: Merges and splits of instances, in their order.
    """

    contender: str
    workload: str
    kind: str
    x: float | None
    round: int
    seconds: float
    requests: list[RequestRecord]
    samples: list[Sample] = msgspec.field(default_factory=list)
    shift: dict[str, int] | None = None
    started: str = ""
    load_average: float = 0.0
    window: tuple[float, float] | None = None
    changes: list[InstanceChange] = msgspec.field(default_factory=list)


class Visits:
    """The visits in a file, one JSON object in each line, so that an interrupted campaign keeps its visits.

    Args:
        path: The file. It need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Visit]:
        """Return all visits. A last line that was not written to its end is left out.

        Raises:
            ValueError: a line in the file is no visit.
        """
        if not self.path.exists():
            return []
        lines, decoder = self.path.read_bytes().split(b"\n"), msgspec.json.Decoder(Visit)
        try:
            return [decoder.decode(line) for line in lines[:-1] if line]
        except msgspec.DecodeError as error:
            raise ValueError(f"{self.path} holds a line that is no visit ({error}); choose another --out") from error

    def add(self, visits: Iterable[Visit]) -> None:
        """Append visits. The rest of an interrupted write is cut off first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            for visit in visits:
                file.write(msgspec.json.encode(visit) + b"\n")
