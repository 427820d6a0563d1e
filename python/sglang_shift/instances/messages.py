"""Defines the messages between the controller and the ranks.

They travel in both directions on sockets that SGLang has: to a rank on the input socket of its scheduler, and from a
rank on the socket on which it answers control requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_shift.cost.layouts import InstanceCosts


@dataclass(frozen=True)
class ChangeLevelReq:
    """The controller asks ranks to form instances of another level.

    The controller sends the request on the input socket of each leader. So all requests that it sent to a rank before
    arrive before it. When the controller sends it, it no longer sends to ranks that will follow.

    Attributes:
        epoch: The number of this change. Epochs rise, and each change has its own.
        first: The first rank of the affected ranks.
        ranks: The number of affected ranks. They are one instance of this level before a split or after a merge.
        level: The ranks of each instance after the change.
        reason: Why the controller asks, in words.
        limits: The tokens that a request of each part may need at most, if some part will split further. Empty if each
            part gets what its instance can hold.
    """

    epoch: int
    first: int
    ranks: int
    level: int
    reason: str
    limits: tuple[int, ...] = ()


@dataclass(frozen=True)
class LevelChanged:
    """The ranks have changed their level, or did not. Rank ``first`` sends this message to the controller.

    Attributes:
        epoch: The number of the change.
        first: The first rank of the affected ranks.
        ranks: The number of affected ranks.
        level: The level that was asked for.
        phases: The seconds of each phase.
        bytes_sent: The bytes of KV cache that all affected ranks sent together.
        tokens_recomputed: The tokens of running requests that must be computed again.
        tokens_dropped: The tokens of KV cache that were not kept, of requests and of cached prefixes.
        ok: Whether the level was changed. If not, the ranks go on at the level that they had.
        reason: Why the level was not changed, in one sentence; else empty.
    """

    epoch: int
    first: int
    ranks: int
    level: int
    phases: dict[str, float]
    bytes_sent: int
    tokens_recomputed: int
    tokens_dropped: int
    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class LevelCosts:
    """What a policy that compares layouts must know of the levels.

    Attributes:
        levels: What an instance of each level can do.
        changes: Seconds of a change from the first level to the second one, as they were measured at the start.
    """

    levels: dict[int, InstanceCosts]
    changes: dict[tuple[int, int], float]


@dataclass(frozen=True)
class InstancesReady:
    """Rank 0 tells the controller how much an instance can hold, before the first request.

    Attributes:
        capacities: The tokens that the KV cache of an instance of each level holds.
        context: The most tokens of a request, prompt and output, that the model can serve.
        costs: What the levels cost; None if no policy needs it.
        page_size: Tokens in a page of the KV cache.
    """

    capacities: dict[int, int]
    context: int
    costs: LevelCosts | None = None
    page_size: int = 1


@dataclass(frozen=True)
class StepsMeasured:
    """A leader tells the controller that its instance has measured its steps again, because their times have drifted.

    Attributes:
        costs: What an instance of this level can do by the new times.
    """

    costs: InstanceCosts


@dataclass(frozen=True)
class RequestsEnded:
    """A leader tells the controller which requests have ended.

    Attributes:
        rids: The ids of the requests.
        outputs: The tokens that each of them has generated; empty if they generate none.
    """

    rids: list[str]
    outputs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class QueueLength:
    """A leader tells the controller how many of its requests wait for their first step.

    Attributes:
        first: The leader's rank.
        waiting: The number of requests.
    """

    first: int
    waiting: int


@dataclass(frozen=True)
class RequestsHeld:
    """A leader tells the controller which requests it has after a change of its level.

    Attributes:
        first: The leader's rank.
        rids: The ids of the requests.
    """

    first: int
    rids: list[str]


ToController = InstancesReady | LevelChanged | QueueLength | RequestsEnded | RequestsHeld | StepsMeasured
"""What ranks tell the controller."""
