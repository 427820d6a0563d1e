"""Says when a policy may ask again for instances that the ranks could not form."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_shift.cost.layouts import Layout


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
    _layout: Layout | None = None
    _seconds: float = 0.0
    _until: float = 0.0

    def allows(self, layout: Layout, now: float) -> bool:
        """Whether the ranks may try a layout now."""
        return layout != self._layout or now >= self._until

    def fail(self, layout: Layout, now: float) -> None:
        """Learn that the ranks have given a layout up."""
        again = layout == self._layout
        self._seconds = min(2 * self._seconds, self.most) if again else self.first
        self._layout, self._until = layout, now + self._seconds

    def succeed(self) -> None:
        """Learn that the ranks have formed the instances that a policy asked for."""
        self._layout = None
