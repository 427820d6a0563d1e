"""Predicts how well a layout of instances serves a demand, from the cost model of each level.

P ranks form instances. An instance of k ranks is at level k. It has one KV cache and runs TP or SP. A layout is the
list of the levels: ``(1, 1, 1, 1)`` is data parallelism over four ranks, and ``(4,)`` is one Shift instance.

The prediction is a mean-value model. If ``n`` requests run, a decode step takes ``s(n)``. A request computes its prompt
in ``p`` seconds, in which nothing else runs, and then takes part in ``o`` decode steps. By Little's law, ``n`` requests
run if requests arrive at the rate ::

    rate(n) = n / (o * s(n) + n * p)

The rate rises with ``n``. At the number of requests that the KV cache holds, it is the instance's capacity.

Requests differ in their tokens ``x``, which costs a small instance more than a large one:

- The KV cache is never full: requests enter in their order, and the next one waits for room for all its tokens. By
  renewal theory, ``E[x^2] / (2 E[x])`` tokens stay free if each request waits equally long. A large one waits longer,
  and in simulations about twice as many tokens stay free. So twice as many count.
- The number of running requests varies around ``n``, by renewal theory with the variance ``n * Var[x] / E[x]^2``. The
  rate is the mean of those one standard deviation below and above ``n``.
- Attention makes the time of a prompt grow faster than its length. So prompts of different lengths take longer than as
  many of the mean length: ``Var[x] / 2`` more reads of the KV cache for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from sglang_shift.cost.measure import kv_reads
from sglang_shift.cost.model import CostModel
from sglang_shift.modes import MODES, Mode, StepState

Layout = tuple[int, ...]
"""The number of ranks of each instance, in the order of the ranks."""

PARTS = 8
"""Steps in which the requests that fit everywhere are divided between the instances of two levels."""
PREFIX = 32768
"""Tokens of cached prefix that a chunk gets more of, to find the time of a read of the KV cache."""
HALVINGS = 40
"""Halvings of the interval in which the number of running requests lies."""


@dataclass(frozen=True, eq=False)
class InstanceCosts:
    """What an instance of some number of ranks can do.

    Attributes:
        ranks: k, a power of two.
        costs: The step times of such an instance.
        tokens: Tokens that its KV cache holds.
        modes: The modes in which its steps may run.
        chunk: Prompt tokens of a step at most.
        max_running: Requests that run at the same time at most.
    """

    ranks: int
    costs: CostModel
    tokens: int
    modes: tuple[Mode, ...] = tuple(MODES)
    chunk: int = 8192
    max_running: int = 1024

    def step_seconds(self, tokens: int, prompt_tokens: int, reads: int) -> float:
        """Return the time of a step in its fastest mode.

        Args:
            tokens: Tokens of the step.
            prompt_tokens: How many of them are prompt tokens.
            reads: Pairs of a query token and a token of the KV cache.
        """
        return self.costs.fastest_seconds(StepState(tokens, prompt_tokens, kv_reads=reads), self.modes)


@cache
def prompt_seconds(level: InstanceCosts, prompt: int) -> float:
    """Return the time of a prompt that is computed in chunks, if nothing else runs."""
    begins = range(0, prompt, level.chunk)
    chunks = [(begin, min(level.chunk, prompt - begin)) for begin in begins]
    return sum(level.step_seconds(n, n, kv_reads(begin, n)) for begin, n in chunks)


@cache
def batched_prompt_seconds(level: InstanceCosts, prompt: int) -> float:
    """Return a prompt's share of the time of full chunks of such prompts."""
    if prompt >= level.chunk:
        return prompt_seconds(level, prompt)
    reads = level.chunk * (prompt + 1) // 2
    return level.step_seconds(level.chunk, level.chunk, reads) * prompt / level.chunk


@cache
def read_seconds(level: InstanceCosts) -> float:
    """Return the time of one more read of the KV cache in a full chunk of prompts."""
    begins = (PREFIX, 2 * PREFIX)
    few, many = (level.step_seconds(level.chunk, level.chunk, kv_reads(begin, level.chunk)) for begin in begins)
    return (many - few) / (level.chunk * PREFIX)


CostsByLevel = Mapping[int, InstanceCosts]
"""The levels of a deployment by their number of ranks."""


@dataclass(frozen=True)
class RequestClass:
    """Requests that are alike.

    Attributes:
        rate: Requests per second.
        prompt: Mean prompt tokens.
        output: Mean output tokens.
        need: Tokens of the largest of these requests: its prompt and its output.
        square: Mean of the square of a request's tokens. 0 if unknown: then all requests count as equally long, and the
            KV cache can be full.
    """

    rate: float
    prompt: float
    output: float
    need: int
    square: float = 0.0

    def share(self, part: float) -> RequestClass:
        """Return a part of the requests."""
        return replace(self, rate=part * self.rate)

    @property
    def variance(self) -> float:
        """The variance of a request's tokens. 0 if unknown."""
        return max(0.0, self.square - (self.prompt + self.output) ** 2)


CALM = 0.85
"""At a higher utilization, queues are long, so that an instance counts as full."""


@dataclass(frozen=True)
class Outlook:
    """What a layout makes of a demand.

    Attributes:
        loss: The share of the demand's tokens beyond what calm instances serve.
        latency: Mean seconds of a request that is served.
    """

    loss: float
    latency: float

    @property
    def key(self) -> tuple[float, float]:
        """Lower for a better outlook: the throughput counts first, then the latency."""
        return self.loss, self.latency


class Load:
    """The prediction for one instance that gets some classes of requests.

    Args:
        level: The level of the instance.
        classes: The requests that it gets. Some must arrive.
    """

    def __init__(self, level: InstanceCosts, classes: Sequence[RequestClass]) -> None:
        self.level = level
        self._decodes: dict[int, float] = {}
        self.rate = sum(c.rate for c in classes)
        weights = [c.rate / self.rate for c in classes]
        pairs = list(zip(weights, classes, strict=True))
        self.output = sum(w * c.output for w, c in pairs)
        self.tokens = sum(w * (c.prompt + c.output) for w, c in pairs)
        self.context = sum(w * c.output * (c.prompt + c.output / 2) for w, c in pairs) / max(self.output, 1e-9)
        alone = [(w, prompt_seconds(level, max(1, round(c.prompt)))) for w, c in pairs]
        attention = read_seconds(level) * sum(w * c.variance for w, c in pairs) / 2
        self.prompt_seconds = sum(w * seconds for w, seconds in alone) + attention
        self.prompt_squares = sum(w * seconds**2 for w, seconds in alone)
        self.batched_seconds = attention + sum(
            w * batched_prompt_seconds(level, max(1, round(c.prompt))) for w, c in pairs
        )
        square = sum(w * c.square for w, c in pairs)
        self.spread = max(0.0, square / self.tokens**2 - 1)
        self.most = max(1.0, min((level.tokens - square / self.tokens) / self.tokens, level.max_running))
        self.capacity = self._rate_at(self.most)

    def _decode_seconds(self, running: float) -> float:
        """Return the seconds of a decode step. Below one request, the step is that of one request."""
        n = max(1, round(running))
        if n not in self._decodes:
            self._decodes[n] = self.level.step_seconds(n, 0, round(n * self.context))
        return self._decodes[n]

    def _rate_at(self, running: float) -> float:
        """Return the rate at which requests end if ``running`` of them run on average."""
        deviation = min(math.sqrt(self.spread * running), 0.9 * running)
        return (self._steady_rate(running - deviation) + self._steady_rate(running + deviation)) / 2

    def _steady_rate(self, running: float) -> float:
        return running / (self.output * self._decode_seconds(running) + running * self.batched_seconds)

    @property
    def loss(self) -> float:
        """The share of the requests beyond what the instance serves while it is calm."""
        return max(0.0, 1 - CALM * self.capacity / self.rate)

    def latency(self) -> float:
        """Return the mean seconds of a request."""
        low, high = 0.0, self.most
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._rate_at(middle) < self.rate else (low, middle)
        rate = min(self.rate, self.capacity)
        busy = min(0.999, rate * self.prompt_seconds)
        waiting = rate * self.prompt_squares / (2 * (1 - busy))  # prompts wait for prompts: Pollaczek and Khinchine
        return high / rate + self.prompt_seconds + waiting


def layouts(ranks: int, levels: Sequence[int]) -> list[Layout]:
    """Return the layouts that a policy chooses from: all instances at one level, or one larger instance beside others.

    Args:
        ranks: P, a power of two.
        levels: The levels that instances may have: powers of two up to P.
    """
    equal = [(k,) * (ranks // k) for k in levels]
    mixed = [(big,) + (k,) * ((ranks - big) // k) for big, k in product(levels, levels) if k < big < ranks]
    return equal + mixed


def outlook(layout: Layout, levels: CostsByLevel, demand: Sequence[RequestClass]) -> Outlook | None:
    """Return what a layout makes of a demand. The result is None if no instance holds one of the classes.

    Requests that only the largest instances hold go to these. The others are divided in the best way.

    Args:
        layout: One of :func:`layouts`, with the larger instances first.
        levels: The levels.
        demand: The classes. Some requests must arrive.
    """
    big, small = max(layout), min(layout)
    if any(c.need > levels[big].tokens for c in demand):
        return None
    demand = [c for c in demand if c.rate > 0]
    if big == small:
        return _combined([(levels[big], layout.count(big), demand)])
    large = [c for c in demand if c.need > levels[small].tokens]
    others = [c for c in demand if c.need <= levels[small].tokens]
    shares = [part / PARTS for part in range(PARTS + 1)] if others else [0.0]
    divisions = (
        [
            (levels[big], layout.count(big), large + [c.share(share) for c in others if share]),
            (levels[small], layout.count(small), [c.share(1 - share) for c in others if share < 1]),
        ]
        for share in shares
    )
    return min((_combined(parts) for parts in divisions), key=lambda o: o.key)


def _combined(parts: Sequence[tuple[InstanceCosts, int, Sequence[RequestClass]]]) -> Outlook:
    """Return the outlook of equal instances at some levels, which share some classes of requests."""
    loads = [(n, Load(level, [c.share(1 / n) for c in classes])) for level, n, classes in parts if classes]
    tokens = [n * load.rate * load.tokens for n, load in loads]
    served = [n * min(load.rate, load.capacity) for n, load in loads]
    loss = sum(t * load.loss for t, (_, load) in zip(tokens, loads, strict=True)) / sum(tokens)
    latency = sum(rate * load.latency() for rate, (_, load) in zip(served, loads, strict=True)) / sum(served)
    return Outlook(loss, latency)
