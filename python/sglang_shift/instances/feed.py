"""Tells a policy what the controller sees: which requests arrive, how much they generate, and how many wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from sglang_shift.cost.deployment import Deployment, InstancePolicy, InstanceState
from sglang_shift.instances.ledger import Ledger, Load

MEMORY = 0.99
"""The weight of what was known, when a request ends. So about the last 100 requests count."""


@dataclass
class PolicyFeed:
    """What a policy must be told beside the ledger.

    A request says how many tokens it may generate, and most end earlier. So the policy gets the share of it that
    requests have generated lately.

    Attributes:
        waiting: How many requests wait at each instance, by its leader.
    """

    waiting: dict[int, int] = field(default_factory=dict)
    _allowed: dict[str, int] = field(default_factory=dict)
    _generated_sum: float = 0.0
    _allowed_sum: float = 0.0

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
        policy.arrived(now, prompt, max(1, round(allowed * self.share)), need)

    def ended(self, rids: Sequence[str], outputs: Sequence[int]) -> None:
        """Learn which requests have ended, and how many tokens they generated, if that is known."""
        known: Sequence[int | None] = outputs or [None] * len(rids)
        for rid, generated in zip(rids, known, strict=True):
            allowed = self._allowed.pop(rid, None)
            if allowed is not None and generated is not None:
                self._generated_sum = MEMORY * self._generated_sum + min(generated, allowed)
                self._allowed_sum = MEMORY * self._allowed_sum + allowed

    @property
    def share(self) -> float:
        """The share of the allowed tokens that requests have generated; 1 before any has ended."""
        return self._generated_sum / self._allowed_sum if self._allowed_sum else 1.0

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
    waiting = min(waiting, load.requests)
    queued = load.newest(waiting)
    return replace(state, running=load.requests - waiting, waiting=waiting, used=load.tokens - queued, queued=queued)
