"""Our adder over SGLang's own, with a KV cache of given size: what prompts take, and what they leave for others."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from calibrations import SECOND_A_TOKEN
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang_shift.cost.chunk_budget import ChunkBudget, Decodes
from sglang_shift.cost.chunk_share import ChunkShare
from sglang_shift.runtime.prefill_adder import ShiftPrefillAdder

ROOM, OUTPUT = 500, 64


class Prompt(MagicMock):
    """A request with as many attributes as the adders read."""

    @property
    def extend_len(self):
        return self.extend_end - self.prefix_len


def prompt(tokens, done=0, host=0, output=OUTPUT, answer=0):
    """A request whose first ``done`` tokens are in the KV cache, and ``host`` tokens after them in host memory."""
    return Prompt(
        rid=f"{tokens}-{done}-{host}", full_untruncated_fill_ids=[1] * tokens, origin_input_ids=[1] * tokens,
        output_ids=[1] * answer, num_matched_prefix_tokens=done + host, prefix_len=done, extend_end=done,
        host_hit_length=host, swa_host_hit_length=0, auxiliary_swa_host_hit_length=0, return_logprob=False,
        input_embeds=None, retracted_stain=False, lora_id=None,
        sampling_params=SimpleNamespace(max_new_tokens=output, ignore_eos=False),
        needs_host_load_back=lambda: host > 0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """SGLang's settings are not published in a unit test."""
    monkeypatch.setattr(PrefillAdder, "_replay_len", lambda self, req, prefix_len: 0)
    monkeypatch.setattr(PrefillAdder, "_account_prefill_cache_admission", lambda self, req, prefix_len: None)
    monkeypatch.setattr(schedule_policy, "get_schedule", lambda: SimpleNamespace(schedule_policy="fcfs"))


def adder(free, waiting=(), running=(), ratio=1.0, mixed=0, chunk=1024):
    """An adder for a step of :data:`ROOM` prompt tokens, with credit for all waiting prompts. Pages have one token."""
    tree = MagicMock(disable=False)
    tree.supports_mamba.return_value = False
    tree.evictable_size.return_value = 0
    allocator = SimpleNamespace(page_size=1, available_size=lambda: free, request_slot_reserve=lambda **_: 0)
    allocator.create_prefill_budget = lambda tree, **offset: PrefillBudget(allocator, tree, **offset)
    batch = SimpleNamespace(reqs=list(running), batch_is_full=False)
    made = ShiftPrefillAdder(1, tree, allocator, batch, ratio, 16_384, chunk, mixed)
    share = ChunkShare()
    share.continue_long(chunk, chunk)
    budget, decodes = ChunkBudget(SECOND_A_TOKEN, ROOM + 1.0, floor=8), Decodes(1, mixed=True)
    made.start(budget, decodes, share, waiting, lambda req: False, lambda req, adapters: True)
    return made


def test_short_prompts_leave_the_memory_that_a_long_prompt_was_admitted_for():
    long, waiting = prompt(3500, done=1500, output=8), [prompt(100 + i) for i in range(4)]
    made = adder(2500, waiting)
    assert made.add_chunked_req(long) is long
    assert 0 < long.extend_len < ROOM
    results = [made.add_one_req(req, True, None) for req in waiting]
    assert made.can_run_list == [long, *waiting[:2]]
    assert results[2] is AddReqResult.NO_TOKEN, "a third prompt and its output would take memory of the long one"


def test_a_prompt_that_ends_reserves_no_more_than_sglang_does():
    long, short = prompt(1700, done=1500, output=8), prompt(100)
    made = adder(200 + 8 + 1 + 100 + OUTPUT + 1 + 1, [short])
    assert made.add_chunked_req(long) is None
    made.add_one_req(short, False, None)
    assert made.can_run_list == [long, short]


def decoding(tokens, output):
    return prompt(1, output=output, answer=tokens)


@pytest.mark.parametrize("mixed", [0, 1])
def test_a_chunk_takes_only_memory_that_is_free(mixed):
    """The request that decodes has grown, and SGLang expects it to grow by more than what is left."""
    long = prompt(3500, done=1500)
    made = adder(300, running=[decoding(100, 1000)], ratio=0.5, mixed=mixed)
    assert made.rem_total_tokens < 0
    assert made.add_chunked_req(long) is long
    assert long.extend_len == 300 - mixed


def test_a_long_prompt_lets_others_decode_if_no_memory_is_free():
    long, short = prompt(3500, done=1500), prompt(100)
    made = adder(1, [short], running=[decoding(100, 1000)], mixed=1)
    assert made.add_chunked_req(long) is long
    assert made.add_one_req(short, True, None) is AddReqResult.OTHER
    assert made.can_run_list == []


def test_a_long_prompt_goes_on_if_nothing_decodes():
    """SGLang reports an error then. No decode step could free memory."""
    long = prompt(3500, done=1500)
    assert adder(0).add_chunked_req(long) is long
    assert long.extend_len == 1


@pytest.mark.parametrize("loaded", [300, 0])
def test_a_prefix_that_host_memory_lost(loaded):
    """The prompt fits beside a long one only with this prefix. The tree loads all of it, or nothing."""
    long, turn = prompt(3500, done=1500), prompt(700, host=300)
    made = adder(10_000, [turn])
    made.tree_cache.init_load_back.return_value = (loaded, turn.last_node)
    assert made.add_chunked_req(long) is long
    assert made.chosen == {turn.rid}
    made.add_one_req(turn, True, None)
    assert made.new_chunked_req is None, "two prompts would continue"
    assert (made.can_run_list == [long, turn]) == (loaded == 300)


def test_a_bound_of_the_memory_makes_no_second_prompt_continue(monkeypatch):
    long, short = prompt(3500, done=1500), prompt(100)
    made = adder(10_000, [short])
    assert made.add_chunked_req(long) is long
    monkeypatch.setattr(PrefillBudget, "check_prefill", lambda self, **asked: (True, 50))  # as of sliding windows
    assert made.add_one_req(short, True, None) is AddReqResult.OTHER
    assert made.new_chunked_req is None and made.can_run_list == [long]


def test_a_prompt_that_begins_is_divided_as_in_sglang():
    first = prompt(3500)
    made = adder(10_000, [first])
    made.add_one_req(first, False, None)
    assert made.new_chunked_req is first and first.extend_len == ROOM
