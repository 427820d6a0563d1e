"""Let SGLang's rank-consensus checker compare only text that is equal on ranks that agree, and only in one instance.

The checker (``SGLANG_ENABLE_RANK_CONSENSUS_CHECKER=1``) compares the ``repr`` of arguments and results, for example of
a request. If two ranks differ, it ends the server. But a grammar object without its own ``repr`` prints its address.
And a set prints its numbers in an order that depends on the history of the set.

A rank writes its decisions into a queue, and a thread compares them with those of other ranks. Ranks of different
instances decide differently. So when a rank enters another level, it also writes the groups of this level into the
queue. What comes before them was decided by the instance before, and is compared there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from queue import Queue
from typing import Any

from sglang.srt.distributed.parallel_state import create_custom_parallel_group
from sglang.srt.utils import rank_consensus_checker as checker
from sglang.srt.utils.rank_consensus_checker import _build_payload as stock_payload
from torch.distributed import ProcessGroup

from sglang_shift.parallel.level import Level
from sglang_shift.seams import relies_on, replaces

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


Groups = list[ProcessGroup]
"""The groups in which the checker compares: one for an instance of several ranks, none for one rank."""


@relies_on(
    "sglang.srt.utils.rank_consensus_checker:configure",
    "This function starts the checker with the groups of the whole world, if the user wants it.",
)
def groups_of_levels(places: Mapping[int, Level]) -> dict[int, Groups]:
    """The checker's own groups for each level. All ranks of the world call it, after SGLang has started the checker."""
    if not checker.enabled():
        return {size: [] for size in places}
    world = max(places)
    made = {size: [_group(place)] for size, place in places.items() if 1 < size < world}
    return {1: [], **made, world: list(checker._sync_groups)}


def _group(place: Level) -> ProcessGroup:
    return create_custom_parallel_group(group_ranks=list(place.instance.ranks), backend="gloo")


@relies_on(
    "sglang.srt.utils.rank_consensus_checker:assert_same",
    "This function writes a decision into the queue of the checker's thread, as text.",
)
def compare_in(groups: Groups) -> None:
    """Compare what this rank decides from now on in these groups."""
    if checker.enabled():
        checker._q.put(groups)


@replaces(
    "sglang.srt.utils.rank_consensus_checker:_worker_loop",
    "The checker must go on with the ranks of another instance, if this rank enters one.",
)
@relies_on(
    "sglang.srt.utils.rank_consensus_checker:shutdown",
    "This function writes None into the queue, to end the thread.",
)
def compare_decisions() -> None:
    """Compare the decisions of this rank until None comes. It runs in the thread of the checker."""
    queue = checker._q
    while True:
        item = queue.get()
        if isinstance(item, str):
            item = _compare(item, queue)
        if item is None:
            return
        if isinstance(item, list):
            checker._sync_groups.clear()
            checker._sync_groups.extend(item)


@relies_on(
    "sglang.srt.utils.rank_consensus_checker:_all_reduce_min_int",
    "This function gives the ranks of the groups the smallest of their numbers.",
)
@relies_on(
    "sglang.srt.utils.rank_consensus_checker:_check_for_consensus",
    "This function compares decisions in the groups, and ends the process if they differ.",
)
def _compare(first: str, queue: Queue[Any]) -> Any:
    """Compare decisions, as many as every rank has, but none beyond other groups or the end.

    Returns:
        What ended the decisions early; the last decision if nothing did.
    """
    decisions = [first]
    item: Any = first
    for _ in range(checker._all_reduce_min_int(queue.qsize())):
        item = queue.get()
        if not isinstance(item, str):
            break
        decisions.append(item)
    checker._check_for_consensus(decisions)
    return item
