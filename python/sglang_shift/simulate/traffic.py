"""Traffic for the simulator and the benchmark: made up with a seed, and changed in time and length."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

Lengths = int | tuple[int, int]
"""Tokens: one number for all requests, or a range from which each is drawn, uniformly in the logarithm."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request to come.

    Attributes:
        time: When it arrives, in seconds.
        prompt: Its prompt tokens, at least 1.
        output: Tokens it generates, at least 1.
        blocks: Names of the blocks that its prompt consists of, from the front; a prompt that is longer ends
            with tokens of its own. Equal names at the front are a prefix that requests share. The simulator,
            which caches nothing, takes no notice.
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
    """Poisson arrivals at a constant rate.

    Args:
        rate: Requests per second.
        prompt: Prompt tokens.
        output: Output tokens.
        requests: How many.
        seed: Of the arrivals and the lengths.
    """
    rng, time, made = random.Random(seed), 0.0, []
    for _ in range(requests):
        time += rng.expovariate(rate)
        made.append(Request(time, _draw(rng, prompt), _draw(rng, output)))
    return made


def ramp(
    first_rate: float, last_rate: float, *, prompt: Lengths, output: Lengths, requests: int, seed: int = 0
) -> list[Request]:
    """Poisson arrivals at a rate that changes linearly, over the time that so many requests take on average.

    Args:
        first_rate: Requests per second at the beginning, 0 or more.
        last_rate: Requests per second at the end, more than 0.
        prompt: Prompt tokens.
        output: Output tokens.
        requests: How many.
        seed: Of the arrivals and the lengths.
    """
    rng, expected, made = random.Random(seed), 0.0, []
    slope = (last_rate**2 - first_rate**2) / (2 * requests)  # of the rate, per second
    for _ in range(requests):
        expected += rng.expovariate(1.0)
        # The time until which so many are expected: slope / 2 * t^2 + first_rate * t = expected. In this form
        # of the root nothing cancels where the slope is small. A falling rate never reaches some numbers.
        root = math.sqrt(max(0.0, first_rate**2 + 2 * slope * expected))
        made.append(Request(2 * expected / (first_rate + root), _draw(rng, prompt), _draw(rng, output)))
    return made


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
    """A steady Poisson stream, and bursts on top.

    Args:
        rate: Requests per second of the stream.
        prompt: Prompt tokens.
        output: Output tokens.
        seconds: How long the stream lasts.
        burst: Requests in a burst.
        every: Seconds from one burst to the next; the first comes after half of that.
        burst_seconds: The time over which the requests of a burst are spread, at random.
        seed: Of the arrivals and the lengths.
    """
    rng, time, times = random.Random(seed), 0.0, []
    while (time := time + rng.expovariate(rate)) < seconds:
        times.append(time)
    start = every / 2
    while start < seconds:
        times += [start + rng.random() * burst_seconds for _ in range(burst)]
        start += every
    return [Request(t, _draw(rng, prompt), _draw(rng, output)) for t in sorted(times)]


def window(requests: Iterable[Request], start: float, seconds: float) -> list[Request]:
    """The requests that arrive in ``[start, start + seconds)``; times count from ``start``."""
    return [replace(r, time=r.time - start) for r in requests if start <= r.time < start + seconds]


def scaled(
    requests: Iterable[Request], time: float = 1.0, length: float = 1.0, context: int | None = None
) -> list[Request]:
    """The same requests in another time and of other lengths.

    Args:
        requests: They stay as they are.
        time: Factor on the times: below 1 they come faster.
        length: Factor on prompt, output and blocks; prompt and output stay at least 1 token.
        context: Tokens that prompt and output have together at most: the output is cut to half of that,
            then the prompt to what is left.

    Raises:
        ValueError: a context of less than 2 tokens.
    """
    if context is not None and context < 2:
        raise ValueError("a context of less than 2 tokens has no room for a prompt and an output")
    made = []
    for r in requests:
        prompt, output = max(1, round(length * r.prompt)), max(1, round(length * r.output))
        if context is not None:
            output = min(output, context // 2)
            prompt = min(prompt, context - output)
        made.append(replace(r, time=time * r.time, prompt=prompt, output=output, block_length=length * r.block_length))
    return made


def _draw(rng: random.Random, lengths: Lengths) -> int:
    if isinstance(lengths, int):
        return lengths
    low, high = lengths
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
