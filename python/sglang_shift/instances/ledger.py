"""Keeps what the controller knows: the instances, and the requests that it has sent to each of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from sglang_shift.cost.deployment import Deployment, InstanceState, Room, smallest_level
from sglang_shift.instances.changes import Change, Layout
from sglang_shift.instances.levels import Instance, Levels


@dataclass(frozen=True)
class Placed:
    """A request that an instance serves.

    Attributes:
        leader: The first rank of the instance.
        need: The tokens that the request takes at most: its prompt and its output.
    """

    leader: int
    need: int


@dataclass
class Load:
    """What the live requests of one instance need, kept up to date with each request that comes or ends.

    Attributes:
        tokens: The tokens that they need.
        largest: The tokens that the largest one needs; 0 if there is none.
    """

    tokens: int = 0
    largest: int = 0
    _needs: dict[str, int] = field(default_factory=dict)  # by the ids of the requests, in the order of their arrival
    _sizes: Counter[int] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        return len(self._needs)

    def add(self, rid: str, need: int) -> None:
        """Count a request that needs so many tokens."""
        self.tokens += need
        self.largest = max(self.largest, need)
        self._needs[rid] = need
        self._sizes[need] += 1

    def remove(self, rid: str) -> None:
        """Count a request no longer."""
        need = self._needs.pop(rid)
        self.tokens -= need
        self._sizes[need] -= 1
        if not self._sizes[need]:
            del self._sizes[need]
            if need == self.largest:
                self.largest = max(self._sizes, default=0)

    def newest(self, count: int) -> tuple[int, ...]:
        """The tokens that each of the last requests needs."""
        return tuple(islice(reversed(self._needs.values()), count))


@dataclass
class Ledger:
    """The instances of a world, and the live requests on each of them.

    Attributes:
        levels: The levels of the world.
        layout: The instances now.
        capacities: The tokens that an instance of each level can hold.
        requests: The live requests by their ids.
        busy: The ranks that change their level now. Nothing is sent to them.
    """

    levels: Levels
    layout: Layout
    capacities: dict[int, int] = field(default_factory=dict)
    requests: dict[str, Placed] = field(default_factory=dict)
    busy: range = range(0)
    _loads: defaultdict[int, Load] = field(default_factory=lambda: defaultdict(Load))  # by the first rank

    @classmethod
    def at(cls, levels: Levels) -> Ledger:
        """A ledger of a world at its lowest level, without requests."""
        return cls(levels, levels.instances(levels.lowest))

    @property
    def leaders(self) -> list[int]:
        """The first ranks of all instances."""
        return [each.leader for each in self.layout]

    def deployment(self, now: float) -> Deployment:
        """The instances as a policy sees them. All requests count as running. Ranks that change hold nothing.

        Args:
            now: The time in seconds.
        """
        return Deployment(now, tuple(self._state(each) for each in self.layout))

    def load(self, leader: int) -> Load:
        """What the requests of the instance with this first rank need."""
        return self._loads[leader]

    def _state(self, instance: Instance) -> InstanceState:
        capacity = 0 if instance.leader in self.busy else self.capacities.get(instance.level, 0)
        load = self._loads[instance.leader]
        return InstanceState(
            instance.level, running=load.requests, used=load.tokens, capacity=capacity, largest=load.largest
        )

    @property
    def largest(self) -> int:
        """The tokens that the largest instance of the layout can hold."""
        return max(self.capacities.get(each.level, 0) for each in self.layout)

    def level_for(self, need: int) -> int | None:
        """The lowest level of which an instance holds ``need`` tokens; None if there is none."""
        return smallest_level(self.rooms, need)

    @property
    def rooms(self) -> dict[int, Room]:
        """The room of an instance of each level."""
        return {level: Room(level, tokens) for level, tokens in self.capacities.items()}

    def place(self, rid: str, instance: Instance, need: int) -> None:
        """Record that a request was sent to an instance."""
        self.end([rid])
        self.requests[rid] = Placed(instance.leader, need)
        self._loads[instance.leader].add(rid, need)

    def end(self, rids: Iterable[str]) -> None:
        """Forget requests that have ended. Unknown ones are ignored."""
        for rid in rids:
            if (placed := self.requests.pop(rid, None)) is not None:
                self._loads[placed.leader].remove(rid)

    def held_by(self, leader: int, rids: Iterable[str]) -> None:
        """Record which requests an instance has after a change."""
        for rid in rids:
            if rid in self.requests:
                self._move(rid, leader)

    def apply(self, change: Change) -> None:
        """Record that a change was made.

        The new leaders say what they hold, before or after this. Other requests of these ranks count for the first one.
        """
        self.layout = change.applied(self.layout)
        leaders = {each.leader for each in change.after}
        silent = set(change.whole.ranks) - leaders
        for rid in [rid for rid, placed in self.requests.items() if placed.leader in silent]:
            self._move(rid, change.whole.leader)

    def _move(self, rid: str, leader: int) -> None:
        placed = self.requests[rid]
        self._loads[placed.leader].remove(rid)
        self._loads[leader].add(rid, placed.need)
        self.requests[rid] = Placed(leader, placed.need)

    def report(self) -> list[dict[str, int]]:
        """The instances as JSON values."""
        return [
            {
                "first": each.leader,
                "level": each.level,
                "requests": state.running,
                "tokens": state.used,
                "capacity": self.capacities.get(each.level, 0),
            }
            for each, state in zip(self.layout, self.deployment(0.0).instances, strict=True)
        ]
