"""What a benchmark run leaves on disk: one line of JSON for each visit of a contender by a workload."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from sglang_shift.modes import Mode

MADE_UP = ("single", "saturated", "rate", "bursty", "long-mix")
TRACES = ("azure", "mooncake")
KINDS = MADE_UP + TRACES
"""The kinds of workload, in the order of reports."""


class RequestRecord(msgspec.Struct, frozen=True):
    """One request as the client saw it. Times are in seconds.

    Attributes:
        due: When it was to be sent, from the start of the visit.
        sent: When it was sent, from the start of the visit.
        ttft: From sending to its first token.
        latency: From sending to its last token.
        itl: Times between its tokens, ``output - 1`` of them; tokens that came together share their time.
        prompt: Its prompt tokens.
        output: The tokens it generated.
        cached: Prompt tokens that the server found in its prefix cache; 0 where it does not say.
        error: What went wrong; empty if nothing did. Then the other fields but ``due`` mean nothing.
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

    @property
    def end(self) -> float:
        """When its last token came, from the start of the visit."""
        return self.sent + self.latency

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there is only one."""
        return (self.latency - self.ttft) / (self.output - 1) if self.output > 1 else None


class Sample(msgspec.Struct, frozen=True):
    """The server's state at a moment. What a server does not tell is None.

    Attributes:
        time: Seconds from the start of the visit.
        running: Requests in the running batch.
        waiting: Requests in the queue.
        kv_usage: Share of the KV pool in use, 0 to 1.
        steps: Steps since the start of the visit, by mode; empty from a server without modes.
    """

    time: float
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    steps: dict[Mode, int] = msgspec.field(default_factory=dict)


class Visit(msgspec.Struct, frozen=True):
    """One workload, sent to one contender once.

    Attributes:
        contender: Its name.
        workload: Its name, such as ``rate 2.0/s``.
        kind: One of :data:`KINDS`.
        x: What a plot over workloads of this kind has on its axis: prompt tokens for ``single``, requests per
            second for ``rate``; None for other kinds.
        round: From 1.
        seconds: From the first request's sending to the last token.
        requests: In the order in which they were due, warm-up not included.
        samples: In the order of their times.
        shift: Changes of our servers' counters over the visit: ``tp_steps`` and so on for each mode, ``switches``,
            ``exchanged_bytes``, ``exchanges``; None from other servers.
        started: Local time, ISO 8601.
        load_average: Of the machine, over the minute before.
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


class Visits:
    """The visits in a file, one JSON object a line, so that an interrupted campaign keeps what it has.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Visit]:
        """All visits; a last line that was not written to its end is left out.

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
        """Append visits; what an interrupted write left is cut off first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            for visit in visits:
                file.write(msgspec.json.encode(visit) + b"\n")
