"""Defines what is sent: named lists of requests, which are the same for every contender."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_shift.simulate.traffic import Request, bursty, ramp, scale, steady

FIRST_TOKEN = 256
"""The lowest token id of prompts. Lower ids are often special tokens or single bytes."""

WARM_UP_SHARE = 1 / 6
"""The share of the arrivals' time before the steady window, as in the simulator of instances."""
CLOSED_WARM_UP_SHARE = 1 / 4
"""The same for a closed loop, which begins with all clients at once."""

MOST_OF_CAPACITY = 4
"""A closed loop has requests for a server of this many times the capacity, so that it never runs dry."""

SHORT, LONG = "short", "long"
"""The groups of requests that a replica can hold, and cannot."""
IDLE, RAMP, BURST = "idle", "ramp", "burst"
"""The groups of ``day``: the requests of each part of it, without the long ones."""


@dataclass(frozen=True)
class Workload:
    """A named list of requests.

    Attributes:
        name: The name of the workload in reports.
        kind: As in :class:`~sglang_shift.tools.benchmark.records.Visit`.
        requests: The requests in the order of their times.
        concurrency: The most requests in flight. None sends each request at its time.
        x: As in :class:`~sglang_shift.tools.benchmark.records.Visit`.
        window: As in :class:`~sglang_shift.tools.benchmark.records.Visit`.
        stop: Seconds after which the workload ends, even if requests have not been answered. None waits for all.
        groups: The name of the group of each request; empty if there are no groups.
    """

    name: str
    kind: str
    requests: Sequence[Request]
    concurrency: int | None = None
    x: float | None = None
    window: tuple[float, float] | None = None
    stop: float | None = None
    groups: Sequence[str] = ()

    def group_of(self, number: int) -> str:
        """Return the name of a request's group; empty if there are no groups."""
        return self.groups[number] if self.groups else ""

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
        clients: Number of requests of ``closed-loop`` that are in flight at all times.
        closed_seconds: Seconds of ``closed-loop``.
        long_shares: The share of long requests of each ``mixed-lengths``.
        long_prompt: Prompt lengths of the long requests of ``mixed-lengths`` and ``day``.
        long_need: A request that needs more tokens, prompt and output, is a long one. None means no such groups.
        mixed_rate: Rate of ``mixed-lengths``, as a share of the rate of short requests at capacity.
        mixed_seconds: Seconds in which the requests of ``mixed-lengths`` arrive.
        day_seconds: Seconds in which the requests of ``day`` arrive.
        day_idle: Rate of its idle part, as a share of the capacity.
        day_peak: Rate at the end of its ramp, as a share of the capacity.
        day_long_share: The share of long requests in its ramp.
        drain: Seconds after the last arrival for which ``mixed-lengths`` and ``day`` wait for answers.
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
    clients: int = 32
    closed_seconds: float = 60.0
    long_shares: tuple[float, ...] = (0.002, 0.005, 0.02)
    long_prompt: tuple[int, int] = (4096, 8192)
    long_need: int | None = None
    mixed_rate: float = 0.9
    mixed_seconds: float = 120.0
    day_seconds: float = 120.0
    day_idle: float = 0.1
    day_peak: float = 1.0
    day_long_share: float = 0.005
    drain: float = 20.0


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
                "closed-loop": self._closed_loop,
                "mixed-lengths": self._mixed_lengths,
                "day": self._day,
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
            workloads.append(self._open(f"rate {rate:.3g}/s", "rate", requests, x=rate))
        return workloads

    def _bursty(self, capacity: float) -> list[Workload]:
        s, rate = self.sizes, self._requests_per_second(capacity)
        every = s.burst_every * s.burst / rate
        lengths: dict[str, Any] = {"prompt": s.prompt, "output": s.output}
        requests = bursty(
            s.burst_stream * rate, seconds=s.bursts * every, burst=s.burst, every=every, seed=2, **lengths
        )
        return [self._open("bursty", "bursty", self._fit(requests))]

    def _long_mix(self, capacity: float) -> list[Workload]:
        s = self.sizes
        long = min(s.long, self.context - s.output[1])
        short = self._fit(self._steady(1.0, s.mix_requests, 3))
        mixed = [
            Request(r.time, long, r.output) if i % s.long_every == s.long_every // 2 else r for i, r in enumerate(short)
        ]
        return [self._open("long-mix", "long-mix", _at_load(mixed, s.mix_rate * capacity))]

    def _long_prompts(self, capacity: float) -> list[Workload]:
        s = self.sizes
        streams = [Request(0.0, s.prompt[0], s.stream_output)] * s.streams
        arrivals = steady(1.0, prompt=s.arriving, output=s.output, requests=s.arriving_requests, seed=4)
        arrivals = _at_load(self._fit(arrivals), s.arriving_rate * capacity)
        return [self._open("long-prompts", "long-prompts", [*self._fit(streams), *arrivals])]

    def _closed_loop(self, capacity: float) -> list[Workload]:
        s = self.sizes
        enough = s.clients + round(MOST_OF_CAPACITY * s.closed_seconds * self._requests_per_second(capacity))
        requests = self._fit(self._steady(1.0, enough, 5, at_once=True))
        window = (CLOSED_WARM_UP_SHARE * s.closed_seconds, s.closed_seconds)
        return [Workload("closed-loop", "closed-loop", requests, s.clients, window=window, stop=s.closed_seconds)]

    def _mixed_lengths(self, capacity: float) -> list[Workload]:
        s = self.sizes
        rate = s.mixed_rate * self._requests_per_second(capacity)
        count = max(2, round(rate * s.mixed_seconds))
        short = self._fit(self._steady(rate, count, 6))
        short = scale(short, time=s.mixed_seconds / short[-1].time)
        return [
            self._open(
                f"mixed-lengths {100 * share:g}%", "mixed-lengths", self._with_long(short, share), x=100 * share,
                stop=s.mixed_seconds + s.drain,
            )
            for share in s.long_shares
        ]  # fmt: skip

    def _day(self, capacity: float) -> list[Workload]:
        """Make a day in short: a quarter is idle, half is a ramp, and the last quarter begins with a burst."""
        s, per_second = self.sizes, self._requests_per_second(capacity)
        quarter, idle, peak = s.day_seconds / 4, s.day_idle * per_second, s.day_peak * per_second
        lengths: dict[str, Any] = {"prompt": s.prompt, "output": s.output}
        calm = _evenly(steady(idle, requests=max(1, round(idle * quarter)), seed=7, **lengths), quarter)
        climb = ramp(idle, peak, requests=max(1, round((idle + peak) * quarter)), seed=8, **lengths)
        climb = self._with_long(self._fit(scale(climb, time=2 * quarter / climb[-1].time)), s.day_long_share)
        burst = scale(steady(1.0, requests=s.burst, seed=9, **lengths), time=0.0)
        parts = [(IDLE, 0.0, calm), (RAMP, quarter, climb), (BURST, 3 * quarter, burst), (IDLE, 3 * quarter, calm)]
        named = [(name, replace(r, time=begin + r.time)) for name, begin, part in parts for r in self._fit(part)]
        named.sort(key=lambda pair: pair[1].time)
        requests = [r for _, r in named]
        groups = [LONG if self._is_long(r) else name for name, r in named]
        return [replace(self._open("day", "day", requests, stop=s.day_seconds + s.drain), groups=groups)]

    def _open(self, name: str, kind: str, requests: Sequence[Request], **more: Any) -> Workload:
        """Return a workload whose requests arrive at their times."""
        span = requests[-1].time
        window = (WARM_UP_SHARE * span, span) if span else None
        return Workload(name, kind, requests, window=window, groups=self._by_length(requests), **more)

    def _is_long(self, request: Request) -> bool:
        need = self.sizes.long_need
        return need is not None and request.prompt + request.output > need

    def _by_length(self, requests: Sequence[Request]) -> Sequence[str]:
        groups = [LONG if self._is_long(r) else SHORT for r in requests]
        return groups if LONG in groups else ()

    def _with_long(self, requests: Sequence[Request], share: float) -> list[Request]:
        """Return the requests with long prompts in place of a share of them, at least one, at equal distances."""
        count = max(1, round(share * len(requests))) if share else 0
        places = {int((i + 0.5) * len(requests) / count) for i in range(count)}
        chooser = random.Random(10)
        low, high = self.sizes.long_prompt
        mixed = [replace(r, prompt=chooser.randint(low, high)) if i in places else r for i, r in enumerate(requests)]
        return self._fit(mixed)

    def _replay(self, trace: Trace, capacity: float) -> Workload:
        requests = self._fit(trace.requests)
        if trace.speed is not None:
            return self._open(trace.kind, trace.kind, scale(requests, time=1 / trace.speed))
        return self._open(trace.kind, trace.kind, _at_load(requests, trace.load * capacity))

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


def _evenly(requests: Sequence[Request], seconds: float) -> list[Request]:
    """Return the requests at equal distances, so that a server that is fast enough has one at a time."""
    return [replace(r, time=i * seconds / len(requests)) for i, r in enumerate(requests)]


def prompt_ids(request: Request, number: int, seed: str, vocabulary: int) -> list[int]:
    """Return the tokens of a request's prompt. Equal blocks have equal tokens. All other tokens differ by request.

    Args:
        request: The request.
        number: The place of the request in its workload.
        seed: The seed of the visit. It is the same for all contenders, and changes with every workload and round.
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
