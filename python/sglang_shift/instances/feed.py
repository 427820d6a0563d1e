"""Tells a policy what the controller sees: which requests arrive, how much they generate, and how many wait."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from sglang_shift.cost.deployment import Deployment, InstancePolicy, InstanceState
from sglang_shift.instances.ledger import Ledger, Load

MEMORY = 0.99
"""The weight of what was known, when a request ends. So about the last 100 requests that are alike count."""


@dataclass
class _Share:
    """The share of the allowed tokens that some requests have generated. The last ones count most."""

    generated: float = 0.0
    allowed: float = 0.0

    def add(self, generated: int, allowed: int) -> None:
        self.generated = MEMORY * self.generated + generated
        self.allowed = MEMORY * self.allowed + allowed

    @property
    def value(self) -> float:
        return self.generated / self.allowed if self.allowed else 1.0


@dataclass
class PolicyFeed:
    """What a policy must be told beside the ledger.

    A request says how many tokens it may generate, and most end earlier. So the policy gets the share of it that
    requests have generated lately which were allowed about as many. Requests without a limit are allowed the most, and
    would hide what the others generate.

    Attributes:
        waiting: How many requests wait at each instance, by its leader.
    """

    waiting: dict[int, int] = field(default_factory=dict)
    _allowed: dict[str, int] = field(default_factory=dict)
    _shares: defaultdict[int, _Share] = field(default_factory=lambda: defaultdict(_Share))

    def arrived(self, policy: InstancePolicy, now: float, rid: str, prompt: int, allowed: int, need: int) -> None:
        """Tell the policy of a request.

        Args:
            policy: The policy.
            now: The time in seconds.
            rid: The id of the request.
            prompt: Its prompt tokens.
            allowed: The tokens that it may generate.
            need: The tokens that an instance must be able to hold for it.
        """
        self._allowed[rid] = allowed
        policy.arrived(now, prompt, max(1, round(allowed * self.share(allowed))), need)

    def ended(self, rids: Sequence[str], outputs: Sequence[int]) -> None:
        """Learn which requests have ended, and how many tokens they generated, if that is known."""
        known: Sequence[int | None] = outputs or [None] * len(rids)
        for rid, generated in zip(rids, known, strict=True):
            allowed = self._allowed.pop(rid, None)
            if allowed is not None and generated is not None:
                self._shares[allowed.bit_length()].add(min(generated, allowed), allowed)

    def share(self, allowed: int) -> float:
        """The share of about so many allowed tokens that requests have generated; 1 before such a request has ended."""
        return self._shares[allowed.bit_length()].value

    def moved(self, ranks: Iterable[int]) -> None:
        """Forget the queues of ranks whose instances have changed. Their leaders report again."""
        for rank in ranks:
            self.waiting.pop(rank, None)

    def view(self, ledger: Ledger, deployment: Deployment) -> Deployment:
        """The deployment, with those requests in queues that came last to their instances."""
        if not any(self.waiting.values()):
            return deployment
        states = [
            _queued(state, ledger.load(leader), self.waiting.get(leader, 0))
            for leader, state in zip(ledger.leaders, deployment.instances, strict=True)
        ]
        return replace(deployment, instances=tuple(states))


def _queued(state: InstanceState, load: Load, waiting: int) -> InstanceState:
    queue = load.newest(waiting)
    return replace(state, running=load.requests - len(queue), queue=queue, used=load.tokens - sum(queue))
