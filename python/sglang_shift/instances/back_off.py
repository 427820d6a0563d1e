"""Says when a policy may ask again for instances that the ranks could not form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_shift.cost.layouts import Layout


class Pause(NamedTuple):
    """The time between two tries of a layout.

    Attributes:
        seconds: How long it is.
        until: When it ends.
    """

    seconds: float
    until: float


@dataclass
class BackOff:
    """Lets time pass before the ranks try a layout again that they have given up, twice as much after each try.

    Other layouts may be tried meanwhile.

    Attributes:
        first: The seconds after the first try.
        most: The most seconds between two tries.
    """

    first: float = 4.0
    most: float = 64.0
    _pauses: dict[Layout, Pause] = field(default_factory=dict)

    def allows(self, layout: Layout, now: float) -> bool:
        """Whether the ranks may try a layout now."""
        return layout not in self._pauses or now >= self._pauses[layout].until

    def denied(self, now: float) -> frozenset[Layout]:
        """The layouts that the ranks may not try now."""
        return frozenset(layout for layout in self._pauses if not self.allows(layout, now))

    def fail(self, layout: Layout, now: float) -> None:
        """Learn that the ranks have given a layout up."""
        before = self._pauses.get(layout)
        seconds = self.first if before is None else min(2 * before.seconds, self.most)
        self._pauses[layout] = Pause(seconds, now + seconds)

    def succeed(self) -> None:
        """Learn that the ranks have formed the instances that a policy asked for."""
        self._pauses.clear()
