"""What SGLang's rank-consensus checker compares, without what differs between ranks that agree.

The checker (``SGLANG_ENABLE_RANK_CONSENSUS_CHECKER=1``) compares the ``repr`` of arguments and results, a request
among them, and ends the server where two ranks' differ. A grammar object without a ``repr`` of its own prints its
address, and a set of numbers prints them in an order that depends on its history.
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
    "the checker compares what is the same on ranks that agree",
)
def build_payload(tag: str, selector: Any, scope: dict[str, Any], skip_name: str | None = None) -> str:
    """SGLang's text of what is compared, the same in every process where the values are."""
    return same_everywhere(stock_payload(tag, selector, scope, skip_name))


def same_everywhere(text: str) -> str:
    """``text`` without addresses, and with sets of numbers in order."""
    return NUMBERS.sub(_in_order, ADDRESS.sub("", text))


def _in_order(numbers: re.Match[str]) -> str:
    return "{" + ", ".join(sorted(numbers[1].split(", "), key=int)) + "}"
