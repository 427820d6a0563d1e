"""Makes traffic for the simulator and the benchmark from a seed, and changes its times and lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

Lengths = int | tuple[int, int]
"""Tokens: one number for all requests, or a range. Each request draws from the range, uniformly in the logarithm."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of some traffic.

    Attributes:
        time: Seconds at which it arrives.
        prompt: Number of its prompt tokens, at least 1.
        output: Number of tokens that it generates, at least 1.
        blocks: Names of the blocks at the front of its prompt. A longer prompt ends with tokens of its own. Requests
            whose first names are equal share a prefix. The simulator caches nothing, so it ignores the blocks.
        block_length: Tokens of a block.
    """

    time: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    block_length: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise ValueError(f"a request needs at least a token of prompt and one of output: {self}")


def steady(rate: float, *, prompt: Lengths, output: Lengths, requests: int, seed: int = 0) -> list[Request]:
    """Make Poisson arrivals at a constant rate.

    Args:
        rate: Requests per second.
        prompt: Prompt tokens.
        output: Output tokens.
        requests: Number of requests.
        seed: Seed of the arrivals and the lengths.
    """
    rng, time, arrivals = random.Random(seed), 0.0, []
    for _ in range(requests):
        time += rng.expovariate(rate)
        arrivals.append(Request(time, _draw(rng, prompt), _draw(rng, output)))
    return arrivals


def ramp(
    first_rate: float, last_rate: float, *, prompt: Lengths, output: Lengths, requests: int, seed: int = 0
) -> list[Request]:
    """Make Poisson arrivals at a rate that changes linearly.

    The rate reaches its last value after the time in which this number of requests arrives on average.

    Args:
        first_rate: Requests per second at the beginning, 0 or more.
        last_rate: Requests per second at the end, more than 0.
        prompt: Prompt tokens.
        output: Output tokens.
        requests: Number of requests.
        seed: Seed of the arrivals and the lengths.
    """
    rng, expected, arrivals = random.Random(seed), 0.0, []
    slope = (last_rate**2 - first_rate**2) / (2 * requests)  # change of the rate per second
    for _ in range(requests):
        expected += rng.expovariate(1.0)
        # Until time t, slope / 2 * t^2 + first_rate * t requests are expected. This is solved for t. In this form of
        # the root nothing cancels if the slope is small. A falling rate never reaches some numbers of requests.
        root = math.sqrt(max(0.0, first_rate**2 + 2 * slope * expected))
        arrivals.append(Request(2 * expected / (first_rate + root), _draw(rng, prompt), _draw(rng, output)))
    return arrivals


def bursty(
    rate: float,
    *,
    prompt: Lengths,
    output: Lengths,
    seconds: float,
    burst: int,
    every: float,
    burst_seconds: float = 0.0,
    seed: int = 0,
) -> list[Request]:
    """Make a steady Poisson stream, with bursts on top.

    Args:
        rate: Requests per second of the stream.
        prompt: Prompt tokens.
        output: Output tokens.
        seconds: Seconds that the stream lasts.
        burst: Requests in a burst.
        every: Seconds from one burst to the next. The first burst comes after half of this time.
        burst_seconds: Seconds over which the requests of a burst are spread at random.
        seed: Seed of the arrivals and the lengths.
    """
    rng, time, times = random.Random(seed), 0.0, []
    while (time := time + rng.expovariate(rate)) < seconds:
        times.append(time)
    start = every / 2
    while start < seconds:
        times += [start + rng.random() * burst_seconds for _ in range(burst)]
        start += every
    return [Request(t, _draw(rng, prompt), _draw(rng, output)) for t in sorted(times)]


def cut_window(requests: Iterable[Request], start: float, seconds: float) -> list[Request]:
    """Return the requests that arrive in ``[start, start + seconds)``. Their times count from ``start``."""
    return [replace(r, time=r.time - start) for r in requests if start <= r.time < start + seconds]


def scale(
    requests: Iterable[Request], time: float = 1.0, length: float = 1.0, context: int | None = None
) -> list[Request]:
    """Return the same requests with other times and lengths.

    Args:
        requests: They do not change.
        time: Factor on the times. Below 1, the requests come faster.
        length: Factor on prompt, output and blocks. Prompt and output stay at least 1 token.
        context: Tokens that prompt and output have together at most. The output is cut to half of the context, then
            the prompt to the rest of it.

    Raises:
        ValueError: the context is less than 2 tokens.
    """
    if context is not None and context < 2:
        raise ValueError("a context of less than 2 tokens has no room for a prompt and an output")
    scaled = []
    for r in requests:
        prompt, output = max(1, round(length * r.prompt)), max(1, round(length * r.output))
        if context is not None:
            output = min(output, context // 2)
            prompt = min(prompt, context - output)
        scaled.append(
            replace(r, time=time * r.time, prompt=prompt, output=output, block_length=length * r.block_length)
        )
    return scaled


def _draw(rng: random.Random, lengths: Lengths) -> int:
    if isinstance(lengths, int):
        return lengths
    low, high = lengths
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
