"""Let SGLang's rank-consensus checker compare only text that is equal on ranks that agree.

The checker (``SGLANG_ENABLE_RANK_CONSENSUS_CHECKER=1``) compares the ``repr`` of arguments and results, for example of
a request. If two ranks differ, it ends the server. But a grammar object without its own ``repr`` prints its address.
And a set prints its numbers in an order that depends on the history of the set.
"""

from __future__ import annotations

import re
from typing import Any

from sglang.srt.utils.rank_consensus_checker import _build_payload as stock_payload

from sglang_shift.seams import replaces

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
NUMBERS = re.compile(r"\{(-?\d+(?:, -?\d+)+)\}")


@replaces(
    "sglang.srt.utils.rank_consensus_checker:_build_payload",
    "The checker must compare only text that is equal on ranks that agree.",
)
def build_payload(tag: str, selector: Any, scope: dict[str, Any], skip_name: str | None = None) -> str:
    """The text that SGLang compares. If the values are equal on two ranks, the texts are equal, too."""
    return same_everywhere(stock_payload(tag, selector, scope, skip_name))


def same_everywhere(text: str) -> str:
    """``text`` without addresses, and with each set of numbers in ascending order."""
    return NUMBERS.sub(_in_order, ADDRESS.sub("", text))


def _in_order(numbers: re.Match[str]) -> str:
    return "{" + ", ".join(sorted(numbers[1].split(", "), key=int)) + "}"
