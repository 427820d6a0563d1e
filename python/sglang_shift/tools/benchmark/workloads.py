"""Defines what is sent: named lists of requests, which are the same for every contender."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_shift.simulate.traffic import Request, bursty, scale, steady

FIRST_TOKEN = 256
"""The lowest token id of prompts. Lower ids are often special tokens or single bytes."""


@dataclass(frozen=True)
class Workload:
    """A named list of requests.

    Attributes:
        name: The name of the workload in reports.
        kind: As in :class:`~sglang_shift.tools.benchmark.records.Visit`.
        requests: The requests in the order of their times.
        concurrency: The most requests in flight. None sends each request at its time.
        x: As in :class:`~sglang_shift.tools.benchmark.records.Visit`.
    """

    name: str
    kind: str
    requests: Sequence[Request]
    concurrency: int | None = None
    x: float | None = None

    @property
    def tokens(self) -> int:
        """Prompt and output tokens of all requests."""
        return sum(r.prompt + r.output for r in self.requests)


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are.

    Lengths are in tokens. Ranges are as in :data:`~sglang_shift.simulate.traffic.Lengths`.

    Attributes:
        prompt: Prompt lengths of all workloads except ``single`` and traces.
        output: Output lengths of all workloads except ``single`` and traces.
        lengths: Prompt lengths of ``single``.
        singles: Number of requests of each length of ``single``.
        single_output: Output length of each request of ``single``.
        saturated: Number of requests that are sent at once.
        rates: Arrival rates of the sweep, as shares of the capacity.
        rate_requests: Number of requests at each rate.
        burst_stream: Rate of the bursty workload's steady stream, as a share of the capacity.
        burst: Number of requests in a burst.
        bursts: Number of bursts.
        burst_every: Time between bursts, in units of the time that a burst alone takes at capacity.
        long: Length of the long prompts of ``long-mix``.
        long_every: One in this number of requests of ``long-mix`` is long.
        mix_requests: Number of requests of ``long-mix``.
        mix_rate: Rate of ``long-mix``, as a share of the capacity in tokens.
        streams: Number of requests of ``long-prompts`` that come first and generate many tokens.
        stream_output: Output length of these requests.
        arriving: Prompt lengths of the other requests of ``long-prompts``, which arrive later.
        arriving_requests: Number of these requests.
        arriving_rate: The rate at which their tokens arrive, as a share of the capacity in tokens.
    """

    prompt: tuple[int, int] = (128, 2048)
    output: tuple[int, int] = (16, 256)
    lengths: tuple[int, ...] = (128, 512, 2048, 8192, 32768)
    singles: int = 5
    single_output: int = 32
    saturated: int = 64
    rates: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    rate_requests: int = 48
    burst_stream: float = 0.25
    burst: int = 24
    bursts: int = 3
    burst_every: float = 2.0
    long: int = 32768
    long_every: int = 16
    mix_requests: int = 48
    mix_rate: float = 0.5
    streams: int = 6
    stream_output: int = 256
    arriving: tuple[int, int] = (128, 4096)
    arriving_requests: int = 24
    arriving_rate: float = 0.8


@dataclass(frozen=True)
class Trace:
    """A recorded trace to replay.

    Attributes:
        kind: ``azure`` or ``mooncake``.
        requests: The requests of the window. Their lengths are scaled, and their times are as recorded.
        load: The mean arrival rate of the tokens in the replay, as a share of the capacity.
        speed: The factor by which arrivals come faster than recorded. If it is given, ``load`` is ignored.
    """

    kind: str
    requests: Sequence[Request]
    load: float = 0.8
    speed: float | None = None


@dataclass(frozen=True)
class Plan:
    """All workloads of a campaign.

    Attributes:
        kinds: The kinds of workloads, in this order.
        sizes: How large the workloads are.
        context: Tokens that a prompt and its output may have together.
        traces: The traces by kind.
    """

    kinds: Sequence[str]
    sizes: Sizes
    context: int
    traces: dict[str, Trace] = field(default_factory=dict)

    def saturated(self) -> Workload:
        """Return all requests at once. The throughput of the first contender is then the campaign's capacity."""
        return Workload("saturated", "saturated", self._fit(self._steady(1.0, self.sizes.saturated, 1, at_once=True)))

    def workloads(self, capacity: float) -> list[Workload]:
        """Return the workloads in the order of ``kinds``.

        Args:
            capacity: Prompt and output tokens per second.
        """
        workloads: list[Workload] = []
        for kind in self.kinds:
            workloads += {
                "single": self._single,
                "saturated": lambda _: [self.saturated()],
                "rate": self._rates,
                "bursty": self._bursty,
                "long-mix": self._long_mix,
                "long-prompts": self._long_prompts,
            }.get(kind, lambda c, kind=kind: [self._replay(self.traces[kind], c)])(capacity)
        return workloads

    def _single(self, _: float) -> list[Workload]:
        s = self.sizes
        fitting = [n for n in s.lengths if n + s.single_output <= self.context]
        return [
            Workload(f"single {n}", "single", [Request(0.0, n, s.single_output)] * s.singles, concurrency=1, x=n)
            for n in fitting
        ]

    def _rates(self, capacity: float) -> list[Workload]:
        workloads = []
        for i, share in enumerate(self.sizes.rates):
            rate = share * self._requests_per_second(capacity)
            requests = self._fit(self._steady(rate, self.sizes.rate_requests, 10 + i))
            workloads.append(Workload(f"rate {rate:.3g}/s", "rate", requests, x=rate))
        return workloads

    def _bursty(self, capacity: float) -> list[Workload]:
        s, rate = self.sizes, self._requests_per_second(capacity)
        every = s.burst_every * s.burst / rate
        lengths: dict[str, Any] = {"prompt": s.prompt, "output": s.output}
        requests = bursty(
            s.burst_stream * rate, seconds=s.bursts * every, burst=s.burst, every=every, seed=2, **lengths
        )
        return [Workload("bursty", "bursty", self._fit(requests))]

    def _long_mix(self, capacity: float) -> list[Workload]:
        s = self.sizes
        long = min(s.long, self.context - s.output[1])
        short = self._fit(self._steady(1.0, s.mix_requests, 3))
        mixed = [
            Request(r.time, long, r.output) if i % s.long_every == s.long_every // 2 else r for i, r in enumerate(short)
        ]
        return [Workload("long-mix", "long-mix", _at_load(mixed, s.mix_rate * capacity))]

    def _long_prompts(self, capacity: float) -> list[Workload]:
        s = self.sizes
        streams = [Request(0.0, s.prompt[0], s.stream_output)] * s.streams
        arrivals = steady(1.0, prompt=s.arriving, output=s.output, requests=s.arriving_requests, seed=4)
        arrivals = _at_load(self._fit(arrivals), s.arriving_rate * capacity)
        return [Workload("long-prompts", "long-prompts", [*self._fit(streams), *arrivals])]

    def _replay(self, trace: Trace, capacity: float) -> Workload:
        requests = self._fit(trace.requests)
        if trace.speed is not None:
            return Workload(trace.kind, trace.kind, scale(requests, time=1 / trace.speed))
        return Workload(trace.kind, trace.kind, _at_load(requests, trace.load * capacity))

    def _steady(self, rate: float, requests: int, seed: int, at_once: bool = False) -> list[Request]:
        arrivals = steady(rate, prompt=self.sizes.prompt, output=self.sizes.output, requests=requests, seed=seed)
        return scale(arrivals, time=0.0) if at_once else arrivals

    def _requests_per_second(self, capacity: float) -> float:
        saturated = self.saturated()
        return capacity * len(saturated.requests) / saturated.tokens

    def _fit(self, requests: Sequence[Request]) -> list[Request]:
        return scale(requests, context=self.context)


def _at_load(requests: Sequence[Request], tokens_per_second: float) -> list[Request]:
    """Scale the times of requests, so that their tokens come at this rate on average."""
    span = requests[-1].time
    tokens = sum(r.prompt + r.output for r in requests)
    return scale(requests, time=tokens / (tokens_per_second * span)) if span else list(requests)


def prompt_ids(request: Request, number: int, seed: int, vocabulary: int) -> list[int]:
    """Return the tokens of a request's prompt. Equal blocks have equal tokens. All other tokens differ by request.

    Args:
        request: The request.
        number: The place of the request in its workload.
        seed: The seed of the visit. It is the same for all contenders, and changes with every round.
        vocabulary: Token ids are less than this number.
    """
    ids: list[int] = []
    for i, block in enumerate(request.blocks):
        end = round((i + 1) * request.block_length)
        ids += _tokens(f"{seed} block {block} {i}", end - len(ids), vocabulary)
    ids += _tokens(f"{seed} request {number}", max(0, request.prompt - len(ids)), vocabulary)
    return ids[: request.prompt]


def _tokens(seed: str, count: int, vocabulary: int) -> list[int]:
    return random.Random(seed).choices(range(min(FIRST_TOKEN, vocabulary - 1), vocabulary), k=count)
