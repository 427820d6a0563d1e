"""Shares steps between a long prompt, which takes several steps, and the waiting prompts that fit whole into a step.

SGLang continues a prompt that it has begun before it begins another one. So a short prompt would wait for all of a long
prompt. Here both get an equal share of the tokens, over time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from sglang_shift.modes import PENDING_REQUESTS


class ChunkShare:
    """Counts how many tokens waiting prompts may take before the long prompt continues.

    The long prompt earns a token for the others with each token that it takes. So the others together never take more
    tokens than the long prompt. It follows from the steps alone, so it is equal on every rank.

    Attributes:
        credit: Prompt tokens that the others may take.
    """

    def __init__(self) -> None:
        self.credit = 0

    def chosen(self, room: int, waiting: Iterable[int], least: int = 1) -> list[int]:
        """Return the positions of the waiting prompts that a step takes beside the long prompt.

        These prompts fit whole, in their order. A prompt that is too long for any step is passed over. But no prompt
        passes one that only waits for credit. Only the first :data:`PENDING_REQUESTS` prompts count.

        Args:
            room: Prompt tokens of the step.
            waiting: The tokens that each waiting prompt needs.
            least: Tokens that the long prompt gets in any case.
        """
        most = room - least
        free = min(self.credit, most)
        found = []
        for position, tokens in enumerate(islice(waiting, PENDING_REQUESTS)):
            if tokens <= most:
                if tokens > free:
                    break
                free -= tokens
                found.append(position)
        return found

    def continue_long(self, tokens: int, most: int) -> None:
        """Record that the long prompt took ``tokens``. The credit never exceeds ``most``."""
        self.credit = min(most, self.credit + tokens)

    def take(self, tokens: int) -> None:
        """Record that ``tokens`` of a step were kept for waiting prompts, beside a long prompt.

        They count even if the step could not take these prompts, for example because the KV cache was full. Otherwise
        each step would keep tokens for them again, and the long prompt would starve.
        """
        self.credit = max(0, self.credit - tokens)

    def reset(self) -> None:
        """Record that no long prompt continues."""
        self.credit = 0
