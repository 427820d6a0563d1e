"""Simulates instances that merge and split, with a real policy and without a model. Cost models drive the clocks.

Each instance makes its steps as :mod:`sglang_shift.simulate.simulator` does: in the order of arrival, and prompts
first. A request reserves KV cache for its whole output when it is admitted. When the layout changes, the ranks
concerned finish their steps, wait for each other, and serve nothing while the KV cache moves. If a part of a split has
no room for the KV cache of all its requests, it computes that of some requests again, as a server does.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sglang_shift.cost.deployment import Deployment, InstancePolicy, InstanceState, starts
from sglang_shift.cost.layouts import CostsByLevel, InstanceCosts, Layout
from sglang_shift.cost.measure import kv_reads
from sglang_shift.simulate.simulator import ServedRequest
from sglang_shift.simulate.traffic import Request

TICK = 0.1
"""Seconds between two questions to the policy about the layout."""


@dataclass(frozen=True)
class Transformation:
    """What a change of the layout costs.

    Attributes:
        seconds: Seconds of each change, without the KV cache.
        seconds_per_token: Seconds for each token that the KV cache of a rank holds at level 1.
    """

    seconds: float = 0.3
    seconds_per_token: float = 0.0


@dataclass(slots=True, eq=False)
class Live:
    """A request on its way. Times are in seconds.

    Attributes:
        request: The request.
        computed: Tokens that are computed, of those that must be before it generates.
        generated: Tokens that it had generated when it lost its KV cache.
        first: The time of the first token.
    """

    request: Request
    computed: int = 0
    generated: int = 0
    first: float = -1.0

    @property
    def need(self) -> int:
        return self.request.prompt + self.request.output

    @property
    def known(self) -> int:
        """Tokens that must be computed before it generates the next one."""
        return self.request.prompt + self.generated

    def lose_cache(self, left: int) -> None:
        """Compute the prompt and what was generated again. ``left`` tokens are not generated."""
        self.generated, self.computed = self.request.output - left, 0


@dataclass
class Outcome:
    """The result of a simulation.

    Attributes:
        served: The requests that ended, in the order of their ends.
        rejected: The requests that no layout of the policy holds.
        unserved: Number of requests that had not ended when the simulation did.
        recomputed: Tokens whose KV cache was lost in splits.
        computed: Prompt tokens computed and tokens generated, by the second in which their steps ended. What was lost
            in a split does not count.
        changes: The time and the new layout of each change.
        seconds_at: Seconds at each layout, with the levels in descending order.
    """

    served: list[ServedRequest] = field(default_factory=list)
    rejected: list[Request] = field(default_factory=list)
    unserved: int = 0
    recomputed: int = 0
    computed: Counter[int] = field(default_factory=Counter)
    changes: list[tuple[float, Layout]] = field(default_factory=list)
    seconds_at: dict[Layout, float] = field(default_factory=dict)

    def tokens_per_second(self, begin: float, end: float) -> float:
        """Return the prompt and output tokens per second of the requests that ended in a window."""
        ended = [s.request for s in self.served if begin <= s.end < end]
        return sum(r.prompt + r.output for r in ended) / (end - begin)

    def computed_per_second(self, begin: int, end: int) -> float:
        """Return the tokens per second that were computed in a window, also for requests that did not end in it."""
        return sum(self.computed[second] for second in range(begin, end)) / (end - begin)


class SimulatedInstance:
    """The requests of an instance, and its clock.

    Args:
        level: Its level.
        clock: When it can begin its first step.
        outcome: What it does is added to it.
    """

    def __init__(self, level: InstanceCosts, clock: float, outcome: Outcome) -> None:
        self.level, self.clock, self.outcome = level, clock, outcome
        self.waiting: deque[Live] = deque()
        self.chunked: Live | None = None
        self.running: set[Live] = set()
        self.ends: dict[int, list[Live]] = {}
        self.decoded = 0
        self.kv_reads = 0
        self.used = 0
        self.queued = 0

    def add(self, live: Live) -> None:
        """Put a request into the queue."""
        self.waiting.append(live)
        self.queued += live.need

    def join(self, live: Live, left: int) -> None:
        """Take a request that has begun to generate, with its KV cache and ``left`` tokens to generate."""
        self.used += live.need
        self._run(live, left)

    def _run(self, live: Live, left: int) -> None:
        self.kv_reads += live.need - left
        self.ends.setdefault(self.decoded + left, []).append(live)
        self.running.add(live)

    @property
    def busy(self) -> bool:
        """Whether there is a step to make."""
        return bool(self.running) or self.chunked is not None or self._admissible()

    def advance(self, until: float) -> None:
        """Make all steps that begin before ``until``."""
        while self.clock < until:
            if self.chunked is not None or self._admissible():
                self._prefill()
            elif self.running:
                self._decode(until)
            else:
                self.clock = until
                return

    def _admissible(self) -> bool:
        if not self.waiting or len(self.running) >= self.level.max_running:
            return False
        return self.used + self.waiting[0].need <= self.level.tokens

    def _prefill(self) -> None:
        """Compute a chunk of prompts."""
        room, reads, finished = self.level.chunk, 0, []
        while room:
            if self.chunked is None:
                if not self._admissible():
                    break
                self.chunked = self.waiting.popleft()
                self.queued -= self.chunked.need
                self.used += self.chunked.need
            live = self.chunked
            now = min(room, live.known - live.computed)
            reads += kv_reads(live.computed, now)
            live.computed += now
            room -= now
            if live.computed == live.known:
                finished.append(live)
                self.chunked = None
        tokens = self.level.chunk - room
        self.clock += self.level.step_seconds(tokens, tokens, reads)
        self.outcome.computed[int(self.clock)] += tokens + len(finished)
        for live in finished:
            live.first = self.clock if live.first < 0 else live.first
            if left := live.request.output - live.generated - 1:
                self._run(live, left)
            else:
                self._end(live)

    def _decode(self, until: float) -> None:
        """Make decode steps until one ends a request, or until a time. All of them have the same requests."""
        running = len(self.running)
        most = min(self.ends) - self.decoded
        first = self.level.step_seconds(running, 0, self.kv_reads)
        slope = (self.level.step_seconds(running, 0, self.kv_reads + running * most) - first) / most
        steps, seconds = 0, 0.0
        if most * first + slope * most * (most - 1) / 2 <= until - self.clock:
            steps, seconds = most, most * first + slope * most * (most - 1) / 2
        else:
            while steps < most and self.clock + seconds < until:
                seconds += first + slope * steps
                steps += 1
        self.clock += seconds
        self.decoded += steps
        self.outcome.computed[int(self.clock)] += running * steps
        self.kv_reads += running * steps
        for live in self.ends.pop(self.decoded, ()):
            self.running.remove(live)
            self.kv_reads -= live.need
            self._end(live)

    def _end(self, live: Live) -> None:
        self.used -= live.need
        request, ttft = live.request, live.first - live.request.time
        tpot = (self.clock - live.first) / (request.output - 1) if request.output > 1 else None
        self.outcome.served.append(ServedRequest(request, ttft, tpot, self.clock - request.time))

    def generating(self) -> list[tuple[Live, int]]:
        """Return the requests that generate, and how many tokens each has left."""
        return [(live, end - self.decoded) for end, lives in self.ends.items() for live in lives]

    def queue(self) -> list[Live]:
        """Return the requests that wait. A prompt in chunks keeps its computed tokens."""
        return ([self.chunked] if self.chunked else []) + list(self.waiting)

    @property
    def largest(self) -> int:
        """Tokens of the largest request."""
        chunked = [self.chunked] if self.chunked else []
        return max((live.need for lives in (self.running, chunked, self.waiting) for live in lives), default=0)

    def state(self) -> InstanceState:
        """Return what a policy sees of it."""
        running = len(self.running) + (self.chunked is not None)
        queue = tuple(live.need for live in self.waiting)
        return InstanceState(self.level.ranks, running, queue, self.used, self.level.tokens, self.largest)


def simulate(
    requests: Sequence[Request],
    policy: InstancePolicy,
    levels: CostsByLevel,
    layout: Layout,
    transformation: Transformation | None = None,
    until: float | None = None,
) -> Outcome:
    """Simulate a deployment that gets ``requests``.

    Args:
        requests: At least one request, in any order.
        policy: The policy.
        levels: The levels that occur.
        layout: The first layout.
        transformation: What a change of the layout costs.
        until: When the simulation ends. None means when all requests have ended.
    """
    return _Simulation(requests, policy, levels, layout, transformation or Transformation(), until).run()


class _Simulation:
    def __init__(
        self,
        requests: Sequence[Request],
        policy: InstancePolicy,
        levels: CostsByLevel,
        layout: Layout,
        transformation: Transformation,
        until: float | None,
    ) -> None:
        self.requests = deque(sorted(requests, key=lambda r: r.time))
        self.policy, self.levels, self.transformation = policy, levels, transformation
        self.until = float("inf") if until is None else until
        self.outcome = Outcome()
        self.now = self.requests[0].time
        self.instances = [SimulatedInstance(levels[k], self.now, self.outcome) for k in layout]
        self.unplaced: list[Live] = []
        self.changed = float("-inf")
        self.tick = self.now

    def run(self) -> Outcome:
        """Go from event to event: an arrival, or a question about the layout."""
        while self.now < self.until and (self.requests or self.unplaced or self._is_busy()):
            self._go_to(self._next_event())
            while self.requests and self.requests[0].time <= self.now:
                request = self.requests.popleft()
                self.policy.arrived(self.now, request.prompt, request.output, request.prompt + request.output)
                self._place(Live(request))
            if self.policy.changes_layout and self.now >= self.tick:
                self.tick = self.now + TICK
                self._ask()
        live = sum(len(i.running) + len(i.queue()) for i in self.instances)
        self.outcome.unserved = live + len(self.unplaced) + len(self.requests)
        return self.outcome

    def _is_busy(self) -> bool:
        return any(i.busy or i.waiting for i in self.instances)

    def _next_event(self) -> float:
        events = [self.until]
        if self.requests:
            events.append(self.requests[0].time)
        if self.policy.changes_layout:
            events.append(max(self.tick, self.now))
        elif not self.requests:
            events.append(self.now + 10.0)
        return min(events)

    def _go_to(self, time: float) -> None:
        layout = tuple(sorted((i.level.ranks for i in self.instances), reverse=True))
        self.outcome.seconds_at[layout] = self.outcome.seconds_at.get(layout, 0.0) + time - self.now
        self.now = time
        for instance in self.instances:
            instance.advance(time)

    def _deployment(self) -> Deployment:
        states = tuple(i.state() for i in self.instances)
        return Deployment(self.now, states, tuple(live.need for live in self.unplaced), self.changed)

    def _place(self, live: Live) -> None:
        index = self.policy.route(self._deployment(), live.need)
        if index is not None:
            self.instances[index].add(live)
        elif self.policy.changes_layout and any(level.tokens >= live.need for level in self.levels.values()):
            self.unplaced.append(live)
        else:
            self.outcome.rejected.append(live.request)

    def _ask(self) -> None:
        deployment = self._deployment()
        wanted = self.policy.wanted(deployment)
        if wanted != deployment.layout and self._change(wanted):
            self.changed = self.now
            self.outcome.changes.append((self.now, wanted))
            unplaced, self.unplaced = self.unplaced, []
            for live in unplaced:
                self._place(live)

    def _change(self, layout: Layout) -> bool:
        """Change the layout, and return whether all parts of it could change."""
        old = dict(zip(starts(tuple(i.level.ranks for i in self.instances)), self.instances, strict=True))
        new = dict(zip(starts(layout), layout, strict=True))
        plans = []
        for first, last in blocks(list(old), list(new), sum(layout)):
            before = [i for at, i in old.items() if first <= at < last]
            levels = [k for at, k in new.items() if first <= at < last]
            if [i.level.ranks for i in before] == levels:
                plans.append((before, before))
                continue
            after = self._redistributed(before, levels)
            if after is None:
                return False
            plans.append((before, after))
        self.instances = [instance for _, after in plans for instance in after]
        return True

    def _redistributed(
        self, before: Sequence[SimulatedInstance], levels: Sequence[int]
    ) -> list[SimulatedInstance] | None:
        """Return new instances with the requests of others, or None if some request fits none of them."""
        if max(i.largest for i in before) > max(self.levels[k].tokens for k in levels):
            return None
        moved = sum(i.used for i in before) / sum(i.level.ranks for i in before)
        clock = max([self.now, *(i.clock for i in before)]) + self.transformation.seconds
        clock += moved * self.transformation.seconds_per_token
        after = [SimulatedInstance(self.levels[k], clock, self.outcome) for k in levels]
        running = sorted((pair for i in before for pair in i.generating()), key=lambda pair: -pair[0].need)
        queue = [live for i in before for live in i.queue()]
        for live, left in running:
            if instance := lightest(after, lambda i: i.used + live.need <= i.level.tokens):  # noqa: B023
                instance.join(live, left)
            else:
                live.lose_cache(left)
                queue.append(live)
                self.outcome.recomputed += live.known
                self.outcome.computed[int(self.now)] -= live.known
        for live in sorted(queue, key=lambda live: live.request.time):
            instance = lightest(after, lambda i: live.need <= i.level.tokens)  # noqa: B023
            assert instance is not None
            instance.add(live)
        return after


def blocks(old: Sequence[int], new: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """Return the ranges of ranks between two boundaries that both layouts have."""
    common = [*sorted(set(old) & set(new)), ranks]
    return list(pairwise(common))


def lightest(
    instances: Sequence[SimulatedInstance], holds: Callable[[SimulatedInstance], bool]
) -> SimulatedInstance | None:
    """Return the instance with the fewest tokens a rank, of those that hold a request; None if none does."""
    return min(filter(holds, instances), key=lambda i: (i.used + i.queued) / i.level.ranks, default=None)
