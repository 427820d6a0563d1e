"""Describes running instances to a policy, and defines what such a policy decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_shift.cost.layouts import InstanceCosts, Layout


class Capacity(Protocol):
    """What an instance of a level holds. :class:`sglang_shift.cost.layouts.InstanceCosts` says more of it."""

    @property
    def ranks(self) -> int:
        """Number of its ranks."""

    @property
    def tokens(self) -> int:
        """Tokens that its KV cache holds."""


@dataclass(frozen=True)
class Room:
    """A :class:`Capacity` of which nothing else is known."""

    ranks: int
    tokens: int


def smallest_level(levels: Mapping[int, Capacity], need: int) -> int | None:
    """Return the smallest level of which an instance holds a request of ``need`` tokens; None if there is none."""
    return min((k for k, level in levels.items() if level.tokens >= need), default=None)


@dataclass(frozen=True)
class InstanceState:
    """An instance as a policy sees it.

    Attributes:
        ranks: Number of its ranks.
        running: Number of its running requests.
        queue: Tokens of each request in its queue, prompt and whole output.
        used: Tokens of its running requests.
        capacity: Tokens that its KV cache holds.
        largest: Tokens of its largest request; 0 if it has none.
    """

    ranks: int
    running: int = 0
    queue: tuple[int, ...] = ()
    used: int = 0
    capacity: int = 0
    largest: int = 0

    @property
    def waiting(self) -> int:
        """Number of requests in its queue."""
        return len(self.queue)

    @property
    def queued(self) -> int:
        """Tokens of the requests in its queue."""
        return sum(self.queue)

    @property
    def load(self) -> float:
        """Tokens of all its requests, by rank."""
        return (self.used + self.queued) / self.ranks


@dataclass(frozen=True)
class Deployment:
    """All instances at a moment.

    Attributes:
        now: The time in seconds.
        instances: The instances in the order of their ranks.
        unplaced: Tokens of each request that no instance holds.
        changed: When the layout changed last.
        denied: Layouts that the ranks have given up lately. A policy takes another one.
    """

    now: float
    instances: tuple[InstanceState, ...]
    unplaced: tuple[int, ...] = ()
    changed: float = float("-inf")
    denied: frozenset[Layout] = frozenset()

    @property
    def layout(self) -> Layout:
        """The number of ranks of each instance."""
        return tuple(i.ranks for i in self.instances)

    def holding(self, need: int) -> list[int]:
        """Return the indexes of the instances that hold a request of ``need`` tokens."""
        return [i for i, state in enumerate(self.instances) if state.capacity >= need]


class InstancePolicy:
    """Keeps the layout, and routes each request to the least loaded instance that holds it.

    Attributes:
        changes_layout: Whether it may ask for another layout. If not, a request that no instance holds is rejected.
        reason: Why the policy asked for another layout last, as a clause; empty if there is nothing to say.
    """

    changes_layout = False
    reason = ""

    def arrived(self, now: float, prompt: int, output: int, need: int | None = None) -> None:
        """Learn of a request.

        Args:
            now: The time in seconds.
            prompt: Prompt tokens.
            output: The tokens that it will generate, as far as that is known.
            need: The tokens that an instance must be able to hold for it; by default prompt and output.
        """

    def changed(self, seconds: float) -> None:
        """Learn how long a change took."""

    def measured(self, costs: InstanceCosts) -> None:
        """Learn new step times of a level."""

    def report(self) -> dict[str, Any]:
        """What the policy knows and predicts, as JSON values."""
        return {}

    def route(self, deployment: Deployment, need: int) -> int | None:
        """Return the index of the instance that gets a request of ``need`` tokens; None if no instance holds it."""
        return least_loaded(deployment, deployment.holding(need))

    def wanted(self, deployment: Deployment) -> Layout:
        """Return the layout that the deployment should have. The current layout means that nothing changes."""
        return deployment.layout


def least_loaded(deployment: Deployment, indexes: Sequence[int]) -> int | None:
    """Return the index of the instance with the fewest tokens a rank; None if there is no index to choose from."""
    return min(indexes, key=lambda i: deployment.instances[i].load, default=None)


def starts(layout: Layout) -> list[int]:
    """Return the first rank of each instance."""
    return [sum(layout[:i]) for i in range(len(layout))]
