"""Decides which ranks form an instance, and which instance gets a request.

A policy sees the state of all instances. It routes each request when the request arrives. Several times a second it may
ask for one layout instead of another. Whoever runs the instances merges and splits them: the simulator
(:mod:`sglang_shift.simulate.instances`), or the controller of a server (:mod:`sglang_shift.runtime.controller`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

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
    InstanceCosts,
    Layout,
    Load,
    Outlook,
    RequestClass,
    layouts,
    outlook,
    prompt_seconds,
)


def merge(
    layout: Layout, states: Sequence[InstanceState], ranks: int, denied: frozenset[Layout] = frozenset()
) -> Layout:
    """Return a layout in which the aligned group of ``ranks`` ranks with the fewest tokens is one instance.

    Args:
        layout: The current layout.
        states: The current instances.
        ranks: The ranks of the new instance.
        denied: Layouts that are not returned. If each group leads to one of these, the current layout is returned.

    Raises:
        ValueError: there is no such group.
    """
    groups: list[tuple[int, int, Layout]] = []
    for first in range(0, sum(layout), ranks):
        members = [i for i, at in enumerate(starts(layout)) if first <= at < first + ranks]
        if sum(layout[i] for i in members) == ranks:
            tokens = sum(states[i].used + states[i].queued for i in members)
            groups.append((tokens, first, (*layout[: members[0]], ranks, *layout[members[-1] + 1 :])))
    if not groups:
        raise ValueError(f"no aligned group of {ranks} ranks in {layout}")
    return next((merged for _, _, merged in sorted(groups) if merged not in denied), layout)


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
            parts = (least.ranks,) * (state.ranks // least.ranks)
            capacity = min(state.capacity, len(parts) * least.tokens)  # a split may take memory from the KV cache
            split = (*deployment.layout[:i], *parts, *deployment.layout[i + 1 :])
            may_split = state.ranks > least.ranks and split not in deployment.denied
            if may_split and state.largest <= least.tokens and state.used <= 0.5 * capacity:
                return split
        return deployment.layout


def merged_for_unplaced(deployment: Deployment, levels: Mapping[int, Capacity]) -> Layout:
    """Return a layout that holds the largest request that no instance holds; the current one if there is none.

    If the ranks have given all layouts for the largest request up lately, the next one counts.
    """
    current = deployment.layout
    needed = (smallest_level(levels, need) for need in sorted(set(deployment.unplaced), reverse=True))
    found = (merge(current, deployment.instances, level, deployment.denied) for level in needed if level is not None)
    return next((layout for layout in found if layout != current), current)


@dataclass
class Demand:
    """Estimates the arriving requests: exponential averages over a window.

    Requests that the smallest instances do not hold are rare. So for these, the higher one of two averages counts: one
    over the window, and one over a window that is longer.

    Attributes:
        limits: Tokens that separate the classes, ascending: what an instance of each level holds.
        window: Seconds over which the averages are taken.
        longer: How many times as long the longer window is.
    """

    limits: tuple[int, ...]
    window: float = 30.0
    longer: float = 4.0
    _averages: list[_Average] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._averages = [
            _Average((self.window,) + (self.longer * self.window,) * (i > 0)) for i in range(len(self.limits))
        ]

    def add(self, now: float, prompt: int, output: int, need: int | None = None) -> None:
        """Count a request. ``need`` is what an instance must hold for it, by default its prompt and its output."""
        need = prompt + output if need is None else need
        for average in self._averages:
            average.begin(now)
        self._averages[self.index(need)].add(now, prompt, output, need)

    def index(self, need: int) -> int:
        """Return the number of the class of a request that needs so many tokens."""
        return min(bisect_left(self.limits, need), len(self.limits) - 1)

    def classes(self, now: float) -> list[RequestClass]:
        """Return the classes of which a request came in the last windows."""
        return [found for average in self._averages if (found := average.at(now)) is not None]


class _Average:
    """The requests of a class: decaying sums of their number, prompts, outputs and squares, over some windows."""

    def __init__(self, windows: Sequence[float]) -> None:
        self.windows = windows
        self.sums = [[0.0, 0.0, 0.0, 0.0] for _ in windows]
        self.need = 0
        self.now = 0.0
        self.start: float | None = None

    def begin(self, now: float) -> None:
        self.start = now if self.start is None else self.start

    def add(self, now: float, prompt: int, output: int, need: int) -> None:
        self._decay(now)
        for sums in self.sums:
            for j, value in enumerate((1.0, float(prompt), float(output), float(prompt + output) ** 2)):
                sums[j] += value
        self.need = max(self.need, need)

    def at(self, now: float) -> RequestClass | None:
        """Return the class as the window with the highest rate has it; None if its requests are forgotten."""
        self._decay(now)
        seen = max(1.0, now - (self.start or 0.0))
        found = [
            RequestClass(
                rate=count / (window * -math.expm1(-seen / window)),
                prompt=prompt / count,
                output=output / count,
                need=self.need,
                square=square / count,
            )
            for window, (count, prompt, output, square) in zip(self.windows, self.sums, strict=True)
            if count > FORGOTTEN
        ]
        return max(found, key=lambda c: c.rate, default=None)

    def _decay(self, now: float) -> None:
        for window, sums in zip(self.windows, self.sums, strict=True):
            factor = math.exp(-(now - self.now) / window)
            sums[:] = [value * factor for value in sums]
        self.now = now


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
        longer: How many times as long the demand of rare classes is averaged as well.
        patience: Seconds for which requests are watched before the first change that no request needs.
        haste: The same, if the waiting requests need more tokens than the running ones.
        loss_seconds: Seconds that demand counts as waiting if as much of it is served as is not.
    """

    ranks: int
    levels: CostsByLevel
    change_seconds: float = 0.5
    margin: float = 0.1
    horizon: float = 10.0
    window: float = 30.0
    longer: float = 4.0
    patience: float = 10.0
    haste: float = 2.0
    loss_seconds: float = 60.0
    changes_layout = True

    def __post_init__(self) -> None:
        limits = tuple(level.tokens for _, level in sorted(self.levels.items()))
        self.demand = Demand(limits, self.window, self.longer)
        self.layouts = layouts(self.ranks, sorted(self.levels))
        self.reason = ""
        self._begin: float | None = None
        self._has_chosen = False
        self._due = float("-inf")
        self._target: Layout | None = None
        self._speeds = {k: float(k) for k in self.levels}
        self._outlooks: dict[Layout, Outlook] = {}
        self._demand: list[RequestClass] = []

    @property
    def dwell(self) -> float:
        """The least seconds between two changes that no request needs."""
        return max(2.0, 20 * self.change_seconds)

    def arrived(self, now: float, prompt: int, output: int, need: int | None = None) -> None:
        self._begin = now if self._begin is None else self._begin
        self.demand.add(now, prompt, output, need)

    def route(self, deployment: Deployment, need: int) -> int | None:
        """Return the instance that has served its requests and this one first, as far as the cost models say."""

        def seconds(i: int) -> float:
            state = deployment.instances[i]
            return (state.used + state.queued + need) / self._speeds[state.ranks]

        return min(deployment.holding(need), key=seconds, default=None)

    def wanted(self, deployment: Deployment) -> Layout:
        """Return a better layout, or the current one."""
        current, now = deployment.layout, deployment.now
        if deployment.unplaced:
            self.reason = f"a request needs {max(deployment.unplaced)} tokens"
            return merged_for_unplaced(deployment, self.levels)
        began = now if self._begin is None else self._begin
        due = max(deployment.changed + self.dwell, began + self.patience)
        if not self._has_chosen and _is_late(deployment):
            due = min(due, began + self.haste)  # a merge that a request needed is no choice
        if now < due:
            return current
        largest = max(s.largest for s in deployment.instances)
        if now >= self._due or (self._target is not None and not self._holds(self._target, largest)):
            self._due = now + DECIDE_S
            self._decide(deployment)
        if self._target is None:
            return current
        wanted = place(self._target, current, deployment.instances, deployment.denied) or current
        self._has_chosen = self._has_chosen or wanted != current
        return wanted

    def _decide(self, deployment: Deployment) -> None:
        classes = self._demand = self._classes(deployment)
        if not classes:
            self._target, self._outlooks, self.reason = None, {}, ""
            return
        self._speeds = {k: self._speed(k, classes) for k in self.levels}
        largest = max(s.largest for s in deployment.instances)
        current = simplified(deployment.layout)
        self._outlooks = {layout: self._outlook(layout, classes) for layout in {*self.layouts, current}}
        scores = {
            layout: self._score(found) for layout, found in self._outlooks.items()
            if layout == current or (self._holds(layout, largest) and _has_place(layout, deployment))
        }  # fmt: skip
        best = min(scores, key=lambda layout: scores[layout])
        better = scores[best] < (1 - self.margin) * scores[current]
        self._target = best if better else None
        if better:
            self.reason = f"{self._prediction(best)}; {self._prediction(current)}"

    def _holds(self, layout: Layout, need: int) -> bool:
        return self.levels[max(layout)].tokens >= need

    def _prediction(self, layout: Layout) -> str:
        found = self._outlooks[layout]
        loss = f", and leaves {100 * found.loss:.0f} % of the demand" if found.loss else ""
        return f"{name_of(layout)} takes {found.latency:.2g} s for a request{loss}"

    def changed(self, seconds: float) -> None:
        """Learn how long a change took. Half of what was known before counts."""
        self.change_seconds = (self.change_seconds + seconds) / 2

    def measured(self, costs: InstanceCosts) -> None:
        """Decide by new step times of a level from now on. They are those of the instance that measured last."""
        self.levels = {**self.levels, costs.ranks: costs}

    def report(self) -> dict[str, Any]:
        """The reason of the last choice, the demand, and the predictions for each layout that serves it."""
        found = {name_of(layout): each for layout, each in self._outlooks.items() if math.isfinite(each.latency)}
        return {
            "reason": self.reason,
            "dwell": self.dwell,
            "demand": [asdict(each) for each in self._demand],
            "predictions": {name: {"loss": each.loss, "seconds": each.latency} for name, each in found.items()},
        }

    def _score(self, found: Outlook) -> float:
        """Return the mean seconds of a request. What is not served waits.

        Only the share ``1 - loss`` of the demand is served. To serve the rest as well takes ``loss / (1 - loss)`` times
        as long. Near 1, the loss alone would hide that one layout serves twice as much as another.
        """
        served = 1 - found.loss
        return found.latency + (self.loss_seconds * found.loss / served if served > 0 else math.inf)

    def _classes(self, deployment: Deployment) -> list[RequestClass]:
        """Return the demand. The requests in queues count as arriving within the horizon, each in its class."""
        index = self.demand.index
        waiting = Counter(index(need) for state in deployment.instances for need in state.queue)
        classes = self.demand.classes(deployment.now)
        return [replace(c, rate=c.rate + waiting[index(c.need)] / self.horizon) for c in classes]

    def _speed(self, ranks: int, classes: Sequence[RequestClass]) -> float:
        """Return the tokens a second of a busy instance, for the requests that it holds."""
        level = self.levels[ranks]
        fitting = [c for c in classes if c.need <= level.tokens]
        if not fitting:
            return float(ranks)
        load = Load(level, fitting)
        return load.capacity * load.tokens

    def _outlook(self, layout: Layout, classes: Sequence[RequestClass]) -> Outlook:
        """Return the outlook, with the time that merging takes if some class fits no instance of the layout."""
        most = self.levels[max(layout)].tokens
        fitting = [c for c in classes if c.need <= most]
        rare = [c for c in classes if c.need > most]
        if not fitting:
            return Outlook(float("inf"), float("inf"))
        found = outlook(layout, self.levels, fitting)
        assert found is not None
        if not rare:
            return found
        # Each of these requests merges the ranks that it needs, and they split after it.
        lost = sum(c.rate * (2 * self.change_seconds + self._alone(c)) * self._share(c) for c in rare)
        return Outlook(min(1.0, found.loss + lost), found.latency * (1 + lost))

    def _share(self, c: RequestClass) -> float:
        """The share of the ranks that a request of a class needs."""
        return (smallest_level(self.levels, c.need) or self.ranks) / self.ranks

    def _alone(self, c: RequestClass) -> float:
        level = self.levels[smallest_level(self.levels, c.need) or max(self.levels)]
        prompt = round(c.prompt)
        return prompt_seconds(level, prompt) + c.output * level.step_seconds(1, 0, prompt)


DECIDE_S = 1.0
"""Seconds between two comparisons of all layouts."""


def name_of(layout: Layout) -> str:
    """Name a layout, such as ``4+1+1+1+1``."""
    return "+".join(map(str, layout))


def simplified(layout: Layout) -> Layout:
    """Return a layout of two levels at most, of which an outlook is known, with the largest instances first.

    Instances between the smallest and the largest ones count as several of the smallest.
    """
    big, small = max(layout), min(layout)
    rest = sum(k for k in layout if k != big)
    return (big,) * layout.count(big) + (small,) * (rest // small)


def _is_late(deployment: Deployment) -> bool:
    return sum(s.queued for s in deployment.instances) > sum(s.used for s in deployment.instances)


def _has_place(layout: Layout, deployment: Deployment) -> bool:
    return place(layout, deployment.layout, deployment.instances, deployment.denied) is not None


def place(
    layout: Layout, current: Layout, states: Sequence[InstanceState], denied: frozenset[Layout] = frozenset()
) -> Layout | None:
    """Return ``layout`` with its largest instance where the fewest tokens must move.

    If there are instances of this size already, the one with the most tokens stays, because the others split.

    Args:
        layout: A layout of equal instances, or of one larger instance and equal others.
        current: The current layout.
        states: The current instances.
        denied: Layouts that are not returned. If each place leads to one of these, None is returned.
    """
    big, small = max(layout), min(layout)
    if big == small:
        return None if layout in denied else layout
    total = sum(layout)
    sized = [at for at, k in zip(starts(current), current, strict=True) if k == big]
    used = dict(zip(starts(current), (s.used + s.queued for s in states), strict=True))

    def cost(first: int) -> int:
        return sum(tokens for at, tokens in used.items() if first <= at < first + big)

    def placed(first: int) -> Layout:
        return (*(small,) * (first // small), big, *(small,) * ((total - first - big) // small))

    places = sorted(sized, key=cost, reverse=True) or sorted(range(0, total, big), key=cost)
    return next((placed(first) for first in places if placed(first) not in denied), None)
