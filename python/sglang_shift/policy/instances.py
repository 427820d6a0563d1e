"""Decides which ranks form an instance, and which instance gets a request.

A policy sees the state of all instances. It routes each request when the request arrives. Several times a second it may
ask for one layout instead of another. Whoever runs the instances merges and splits them: the simulator
(:mod:`sglang_shift.simulate.instances`), or the controller of a server (:mod:`sglang_shift.runtime.controller`), which
has no step times of each level, and so no :class:`AutoPolicy`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang_shift.cost.deployment import (
    Capacity,
    Deployment,
    InstancePolicy,
    InstanceState,
    least_loaded,
    smallest_level,
    starts,
)
from sglang_shift.cost.layouts import (
    CostsByLevel,
    Layout,
    Load,
    Outlook,
    RequestClass,
    layouts,
    outlook,
    prompt_seconds,
)


def merge(layout: Layout, states: Sequence[InstanceState], ranks: int) -> Layout:
    """Return a layout in which the aligned group of ``ranks`` ranks with the fewest tokens is one instance.

    Raises:
        ValueError: there is no such group.
    """
    groups: list[tuple[int, int, int]] = []
    for first in range(0, sum(layout), ranks):
        members = [i for i, at in enumerate(starts(layout)) if first <= at < first + ranks]
        if sum(layout[i] for i in members) == ranks:
            groups.append((sum(states[i].used + states[i].queued for i in members), members[0], members[-1]))
    if not groups:
        raise ValueError(f"no aligned group of {ranks} ranks in {layout}")
    _, begin, end = min(groups)
    return (*layout[:begin], ranks, *layout[end + 1 :])


@dataclass
class PaperPolicy(InstancePolicy):
    """Gyges' rules (arXiv 2509.19729), as far as its abstract and summaries of it say them.

    Requests go to the least loaded instance that holds them. If there is none, the instances with the least load merge
    until one holds the request. An instance splits when none of its requests needs its level and half of its KV cache
    is free.

    Attributes:
        levels: The levels.
        dwell: Least seconds between two changes.
    """

    levels: Mapping[int, Capacity]
    dwell: float = 2.0
    changes_layout = True

    def route(self, deployment: Deployment, need: int) -> int | None:
        """Return the least loaded of the smallest instances that hold the request."""
        holds = deployment.holding(need)
        smallest = min((deployment.instances[i].ranks for i in holds), default=0)
        return least_loaded(deployment, [i for i in holds if deployment.instances[i].ranks == smallest])

    def wanted(self, deployment: Deployment) -> Layout:
        if deployment.now - deployment.changed < self.dwell:
            return deployment.layout
        if deployment.unplaced:
            return merged_for_unplaced(deployment, self.levels)
        for i, state in enumerate(deployment.instances):
            least = self.levels[min(self.levels)]
            if state.ranks > least.ranks and state.largest <= least.tokens and state.used <= 0.5 * state.capacity:
                parts = (least.ranks,) * (state.ranks // least.ranks)
                return (*deployment.layout[:i], *parts, *deployment.layout[i + 1 :])
        return deployment.layout


def merged_for_unplaced(deployment: Deployment, levels: Mapping[int, Capacity]) -> Layout:
    """Return a layout that holds the largest request that no instance holds; the current one if there is none."""
    level = smallest_level(levels, max(deployment.unplaced))
    return deployment.layout if level is None else merge(deployment.layout, deployment.instances, level)


@dataclass
class Demand:
    """Estimates the arriving requests: exponential averages over a window.

    Attributes:
        limits: Tokens that separate the classes, ascending: what an instance of each level holds.
        window: Seconds over which the averages are taken.
    """

    limits: tuple[int, ...]
    window: float = 30.0
    _sums: list[list[float]] = field(default_factory=list)
    _needs: list[int] = field(default_factory=list)
    _at: float = 0.0
    _begin: float | None = None

    def __post_init__(self) -> None:
        self._sums = [[0.0, 0.0, 0.0] for _ in self.limits]
        self._needs = [0 for _ in self.limits]

    def add(self, now: float, prompt: int, output: int) -> None:
        """Count a request."""
        self._decay(now)
        i = next((i for i, limit in enumerate(self.limits) if prompt + output <= limit), len(self.limits) - 1)
        for j, value in enumerate((1.0, float(prompt), float(output))):
            self._sums[i][j] += value
        self._needs[i] = max(self._needs[i], prompt + output)

    def classes(self, now: float) -> list[RequestClass]:
        """Return the classes of which a request came in the last windows."""
        self._decay(now)
        seen = self.window if self._begin is None else min(self.window, max(1.0, now - self._begin))
        return [
            RequestClass(count / seen, prompt / count, output / count, need)
            for (count, prompt, output), need in zip(self._sums, self._needs, strict=True)
            if count > FORGOTTEN
        ]

    def _decay(self, now: float) -> None:
        self._begin = now if self._begin is None else self._begin
        factor = math.exp(-(now - self._at) / self.window)
        self._sums = [[value * factor for value in sums] for sums in self._sums]
        self._at = now


FORGOTTEN = 0.02
"""The count below which a class no longer counts: a single request is forgotten after four windows."""


@dataclass
class AutoPolicy(InstancePolicy):
    """Chooses the layout whose outlook is best, by the cost models of the levels.

    A request that no instance holds makes instances merge at once. Otherwise a layout must be better by a margin, and
    some time must have passed. A layout that cannot hold a live request is not considered.

    Attributes:
        ranks: P.
        levels: The levels.
        change_seconds: Seconds for which the ranks that change do not serve.
        margin: The share by which a layout must be better.
        horizon: Seconds in which a queue should be served. The queue counts as this much more demand.
        window: Seconds over which the demand is averaged.
    """

    ranks: int
    levels: CostsByLevel
    change_seconds: float = 0.5
    margin: float = 0.05
    horizon: float = 10.0
    window: float = 30.0
    changes_layout = True

    def __post_init__(self) -> None:
        self.demand = Demand(tuple(level.tokens for _, level in sorted(self.levels.items())), self.window)
        self.layouts = layouts(self.ranks, sorted(self.levels))
        self.dwell = max(2.0, 20 * self.change_seconds)
        self._target: Layout | None = None
        self._speeds = {k: float(k) for k in self.levels}

    def arrived(self, now: float, prompt: int, output: int) -> None:
        self.demand.add(now, prompt, output)

    def route(self, deployment: Deployment, need: int) -> int | None:
        """Return the instance that has served its requests and this one first, as far as the cost models say."""

        def seconds(i: int) -> float:
            state = deployment.instances[i]
            return (state.used + state.queued + need) / self._speeds[state.ranks]

        return min(deployment.holding(need), key=seconds, default=None)

    def wanted(self, deployment: Deployment) -> Layout:
        """Return a better layout, or the current one."""
        current = deployment.layout
        if deployment.unplaced:
            return merged_for_unplaced(deployment, self.levels)
        if deployment.now - deployment.changed < self.dwell:
            return current
        classes = self._classes(deployment)
        if not classes:
            return current
        self._speeds = {k: self._speed(k, classes) for k in self.levels}
        self._target = self._better(deployment, classes)
        return current if self._target is None else place(self._target, current, deployment.instances)

    def drains_to(self, deployment: Deployment) -> int | None:
        if self._target is None or max(self._target) >= max(deployment.layout):
            return None
        return max(self._target)

    def _classes(self, deployment: Deployment) -> list[RequestClass]:
        """Return the demand. The requests in queues count as arriving within the horizon."""
        waiting = sum(s.waiting for s in deployment.instances)
        classes = self.demand.classes(deployment.now)
        rate = sum(c.rate for c in classes)
        return [c.share(1 + waiting / self.horizon / rate) for c in classes]

    def _speed(self, ranks: int, classes: Sequence[RequestClass]) -> float:
        """Return the tokens a second of a busy instance, for the requests that it holds."""
        level = self.levels[ranks]
        fitting = [c for c in classes if c.need <= level.tokens]
        if not fitting:
            return float(ranks)
        load = Load(level, fitting)
        return load.capacity * load.tokens

    def _better(self, deployment: Deployment, classes: Sequence[RequestClass]) -> Layout | None:
        """Return the best layout that holds all live requests; None if it is not better by the margin."""
        largest = max(s.largest for s in deployment.instances)
        holding = [layout for layout in self.layouts if self.levels[max(layout)].tokens >= largest]
        outlooks = {layout: self._outlook(layout, classes) for layout in holding}
        best = min(outlooks, key=lambda layout: outlooks[layout].key, default=None)
        if best is None or sorted(best) == sorted(deployment.layout):
            return None
        new, now = outlooks[best], self._outlook(deployment.layout, classes)
        if now.loss == new.loss:
            return best if new.latency < (1 - 2 * self.margin) * now.latency else None
        return best if new.loss < now.loss - self.margin else None

    def _outlook(self, layout: Layout, classes: Sequence[RequestClass]) -> Outlook:
        """Return the outlook, with the time that merging takes if some class fits no instance of the layout."""
        most = self.levels[max(layout)].tokens
        fitting = [c for c in classes if c.need <= most]
        rare = [c for c in classes if c.need > most]
        if not fitting:
            return Outlook(float("inf"), float("inf"))
        found = outlook(tuple(sorted(layout, reverse=True)), self.levels, fitting)
        assert found is not None
        if not rare:
            return found
        # Each of these requests merges all ranks that it needs, and they split after it.
        lost = sum(c.rate * (2 * self.change_seconds + self._alone(c)) for c in rare)
        return Outlook(min(1.0, found.loss + lost), found.latency * (1 + lost))

    def _alone(self, c: RequestClass) -> float:
        level = self.levels[smallest_level(self.levels, c.need) or max(self.levels)]
        prompt = round(c.prompt)
        return prompt_seconds(level, prompt) + c.output * level.step_seconds(1, 0, prompt)


def place(layout: Layout, current: Layout, states: Sequence[InstanceState]) -> Layout:
    """Return ``layout`` with its largest instance where the fewest tokens must move.

    Args:
        layout: A layout of equal instances, or of one larger instance and equal others.
        current: The current layout.
        states: The current instances.
    """
    big, small = max(layout), min(layout)
    if big == small:
        return layout
    total = sum(layout)
    kept = {(at, k) for at, k in zip(starts(current), current, strict=True)}
    used = dict(zip(starts(current), (s.used + s.queued for s in states), strict=True))

    def cost(first: int) -> tuple[bool, int]:
        inside = sum(tokens for at, tokens in used.items() if first <= at < first + big)
        return (first, big) not in kept, inside

    first = min(range(0, total, big), key=cost)
    return (*(small,) * (first // small), big, *(small,) * ((total - first - big) // small))
