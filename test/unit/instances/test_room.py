"""The room that a request needs, against SGLang's own arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang_shift.instances.room import RoomRule

CONTEXT = 4096


class Adder(PrefillAdder):
    """SGLang's adder for one request beside an empty cache."""

    def __init__(self, page_size: int, capacity: int) -> None:
        self.page_size = self.per_req_token_overhead = page_size
        self.memory_budget = SimpleNamespace(remaining_total=capacity)

    def admits(self, prompt: int, output: int) -> bool:
        total = prompt + output + self.per_req_token_overhead
        sizes = {"extend_input_len": prompt, "max_new_tokens": output, "input_tokens": prompt}
        admitted, _ = PrefillBudget.check_prefill(
            self.memory_budget, total_tokens=total, swa_host_hit_length=0, chunk_limit=None, **sizes
        )
        return admitted


def limit(page_size: int, capacity: int, prompt: int, output: int) -> int:
    """The limit of the output that SGLang gives a request."""
    most = max(0, min(output, capacity - 1 - prompt - 1))
    return BaseTokenToKVPoolAllocator.max_new_tokens_for_memory(
        SimpleNamespace(page_size=page_size), prompt, most,
        token_capacity=capacity, sliding_window_size=None, chunk_size=None,
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_the_room_is_exactly_what_sglang_needs(page_size):
    rule, capacity = RoomRule(page_size, CONTEXT), 96
    for prompt in range(1, capacity + 1):
        for output in range(1, capacity + 1):
            mine = limit(page_size, capacity, prompt, output)
            accepted = prompt < capacity - 6
            whole = accepted and mine == output and Adder(page_size, capacity).admits(prompt, mine)
            assert (rule.room(prompt, output) <= capacity) == whole, (prompt, output)


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_each_prompt_up_to_the_longest_one_is_admitted(page_size):
    rule, capacity = RoomRule(page_size, CONTEXT), 96
    for prompt in range(1, capacity + 1):
        admitted = Adder(page_size, capacity).admits(prompt, limit(page_size, capacity, prompt, 1000))
        assert (prompt <= rule.longest_prompt(capacity)) == admitted, prompt


@pytest.mark.parametrize(
    ("prompt", "output", "need"),
    [
        (995, 4, 1008 + 4 + 17),  # SGLang would accept it on an instance of 1008 tokens, and let it wait for ever
        (960, 31, 1008),
        (960, 32, 1009),
        (960, None, 960 + 1 + 17),  # only the prompt must fit
        (960, 5000, 960 + 1 + 17),  # more than any instance serves
        (960, 0, 960 + 1 + 17),
    ],
)
def test_the_need_of_a_request(prompt, output, need):
    assert RoomRule(16, CONTEXT).need(prompt, output, largest=2016) == need


def test_the_context_bounds_what_a_request_can_reach():
    rule = RoomRule(1, 100)
    assert rule.need(60, 38, largest=1000) == 100
    assert rule.need(60, 40, largest=1000) == 100, "the tokenizer manager accepts it, and SGLang cuts it to 38 tokens"
    assert rule.need(60, 40, largest=99) == 67
    assert rule.need(60, 40, largest=1000, generated=37) == 100
    assert rule.need(97, 3, largest=1000) == 104, "only the prompt must fit"


def test_a_request_that_runs_needs_its_tokens_and_one_more():
    rule = RoomRule(16, CONTEXT)
    assert rule.need(470, 8, 992, generated=7) == 480 + 8 + 17
    for output in (None, 5000, 7):  # without a limit, beyond any instance, and at its limit
        assert rule.need(470, output, 992, generated=7) == 480 + 8 + 17
