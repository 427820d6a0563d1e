"""Our adder over a stand-in for SGLang's: what it lets each prompt take, and what it counts."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from calibrations import LINE, SECOND_A_TOKEN
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang_shift.cost.chunk_budget import ChunkBudget, Decodes, Prompts
from sglang_shift.cost.chunk_share import ChunkShare
from sglang_shift.cost.model import CostModel, Curve
from sglang_shift.modes import Mode
from sglang_shift.runtime import prefill_adder
from sglang_shift.runtime.prefill_adder import ShiftPrefillAdder

PAGE = 4


class Prompt:
    def __init__(self, tokens, cached=0, logprobs=False, adapter=None):
        self.rid = str(id(self))
        self.full_untruncated_fill_ids = self.origin_input_ids = [1] * tokens
        self.output_ids = []
        self.num_matched_prefix_tokens = self.prefix_len = self.extend_end = cached
        self.host_hit_length = 0
        self.return_logprob, self.input_embeds = logprobs, None
        self.sampling_params = SimpleNamespace(max_new_tokens=8)
        self.lora_id = adapter

    @property
    def extend_len(self):
        return self.extend_end - self.prefix_len

    def finished(self):
        return False


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """SGLang's adder as far as the chunk is concerned, in pages of four tokens."""

    def add(self, req, most):
        req.extend_end = req.prefix_len + most
        self.can_run_list.append(req)
        self.rem_chunk_tokens -= self.ceil_paged_tokens(most)

    def add_one_req(self, req, has_chunked_req, truncation_align_size):
        rest = len(req.full_untruncated_fill_ids) - req.prefix_len
        if rest > self.rem_chunk_tokens:
            rest = self.rem_chunk_tokens // PAGE * PAGE
            if not rest:
                return AddReqResult.OTHER
            self.new_chunked_req = req
        add(self, req, rest)
        return AddReqResult.CONTINUE if self.rem_chunk_tokens > 0 else AddReqResult.OTHER

    def add_chunked_req(self, req):
        rest = len(req.full_untruncated_fill_ids) - req.prefix_len
        most = min(self.rem_chunk_tokens, self.chunked_req_limit)
        add(self, req, min(rest, most))
        return req if rest > most else None

    def match(req, tree_cache):
        req.num_matched_prefix_tokens = tree_cache.get(req, 0)

    monkeypatch.setattr(PrefillAdder, "add_one_req", add_one_req)
    monkeypatch.setattr(prefill_adder, "match_kv_cache", match)
    monkeypatch.setattr(PrefillAdder, "add_chunked_req", add_chunked_req)


def any_adapter(prompt, adapters):
    return True


def adder(
    target, decodes, waiting=(), share=None, chunk=1000, floor=8, needs_tp=lambda prompt: False, costs=SECOND_A_TOKEN,
    most=None, adapter_fits=any_adapter,
):  # fmt: skip
    made = object.__new__(ShiftPrefillAdder)
    made.prefill_max_requests = most
    made.page_size, made.rem_chunk_tokens = PAGE, chunk
    made.running_batch, made.tree_cache = SimpleNamespace(batch_is_full=False, reqs=[]), {}
    made.can_run_list, made.new_chunked_req, made.chunked_req_limit = [], None, None
    made.memory_budget = MagicMock(remaining_current=10**6)
    budget = ChunkBudget(costs, target, floor=floor)
    made.start(budget, decodes, share or ChunkShare(), waiting, needs_tp, adapter_fits)
    return made


def add(made, *prompts, has_chunked=False):
    return [made.add_one_req(prompt, has_chunked, None) for prompt in prompts]


def tokens(made):
    return [req.extend_len for req in made.can_run_list]


def test_without_decodes_sglang_s_chunk_counts():
    made = adder(1.0, Decodes())
    add(made, Prompt(600), Prompt(900))
    assert tokens(made) == [600, 400]
    assert made.rem_chunk_tokens == 0


def test_prompts_share_what_fits_the_target():
    made = adder(110.0, Decodes(10, mixed=True))
    first, second, third = Prompt(40), Prompt(100), Prompt(5)
    results = add(made, first, second, third)
    assert tokens(made) == [40, 60]
    assert results[2] is AddReqResult.OTHER, "only one prompt can continue"
    assert made.new_chunked_req is second
    assert made.prompts == Prompts().plus(0, 40).plus(0, 60)
    assert made.room == 100
    assert made.rem_chunk_tokens == 900


def test_a_decode_step_that_follows_comes_off_the_target():
    made = adder(110.0, Decodes(10))
    add(made, Prompt(500))
    assert tokens(made) == [100]


def test_the_floor():
    made = adder(1.0, Decodes(10, mixed=True))
    add(made, Prompt(500))
    assert tokens(made) == [8]


def test_logprobs_make_the_step_alternate_if_there_is_room_for_that():
    made = adder(110.0, Decodes(10, mixed=True))
    add(made, Prompt(40), Prompt(30, logprobs=True))
    assert tokens(made) == [40, 30]
    assert not made.decodes.mixed
    made = adder(40.0, Decodes(10, width=2, mixed=True))
    results = add(made, Prompt(28), Prompt(12, logprobs=True))  # 28 + 10 take 38 s, but 28 and then 20 take 48
    assert tokens(made) == [28]
    assert results[1] is AddReqResult.OTHER
    assert made.decodes.mixed


def test_a_long_prompt_shares_its_steps_with_short_ones():
    share = ChunkShare()
    short, medium, other = Prompt(30), Prompt(200), Prompt(20)
    long = Prompt(1000)
    made = adder(110.0, Decodes(10, mixed=True), [long, short, medium, other], share)
    add(made, long)
    assert tokens(made) == [100], "the first step is the long prompt's own"
    assert add(made, short) == [AddReqResult.OTHER]
    assert share.credit == 100

    long.prefix_len = long.extend_end
    made = adder(110.0, Decodes(10, mixed=True), [short, medium, other], share)
    assert made.add_chunked_req(long) is long
    assert long.extend_len == 100 - 32 - 20  # in pages
    results = add(made, short, medium, other, has_chunked=True)
    assert tokens(made) == [48, 30, 20]
    assert results[:2] == [AddReqResult.CONTINUE] * 2
    assert share.credit == 100 + 48 - 32 - 20


def test_tokens_kept_for_a_prompt_that_is_not_added_are_spent():
    """SGLang may not admit it, for example because the KV cache is full. The next step is the long prompt's own."""
    share, short, long = ChunkShare(), Prompt(96), Prompt(1000)
    taken = []
    for _ in range(5):
        made = adder(110.0, Decodes(10, mixed=True), [short], share)
        assert made.add_chunked_req(long) is long
        taken.append(long.extend_len)
        long.prefix_len = long.extend_end
    assert taken == [100, 4, 100, 4, 100]


def test_nothing_is_kept_for_others_if_the_batch_is_full():
    share, short, long = ChunkShare(), Prompt(30), Prompt(1000)
    share.continue_long(500, 1000)
    made = adder(110.0, Decodes(10, mixed=True), [short], share)
    made.running_batch.batch_is_full = True
    made.add_chunked_req(long)
    assert tokens(made) == [100]


def test_a_cached_prefix_is_looked_up_once_before_the_choice():
    share, turn, long = ChunkShare(), Prompt(5000), Prompt(1000)
    share.continue_long(500, 1000)
    made = adder(110.0, Decodes(10, mixed=True), [turn], share)
    made.tree_cache = {turn: 4980}
    made.add_chunked_req(long)
    assert tokens(made) == [80] and made.chosen == {turn.rid}
    made = adder(110.0, Decodes(10, mixed=True), [turn], share)
    made.tree_cache = {turn: 0}
    made.add_chunked_req(long)
    assert made.chosen == {turn.rid}, "SGLang looks again when it adds the prompt"


def test_without_credit_nothing_passes_a_long_prompt():
    made = adder(110.0, Decodes(10, mixed=True), [short := Prompt(30)])
    assert made.add_chunked_req(Prompt(1000)) is not None
    assert tokens(made) == [100]
    assert add(made, short, has_chunked=True) == [AddReqResult.OTHER]


def test_a_prompt_that_needs_tp_counts_in_tp():
    slow = Curve((1, 10_001), (2.0, 20_002.0))
    curves = {Mode.TP: slow, Mode.SP: LINE}
    costs = CostModel({**SECOND_A_TOKEN.curves, "prefill": curves}, SECOND_A_TOKEN.usual, SECOND_A_TOKEN.attention, 0.0)
    image, plain = Prompt(500), Prompt(20)
    made = adder(110.0, Decodes(10, mixed=True), costs=costs, needs_tp=lambda prompt: prompt is image)
    add(made, plain, image)
    assert tokens(made) == [20, (110 // 2 - 10 - 20) // PAGE * PAGE]
    assert made.budget.modes == (Mode.TP,)


def test_the_cached_prefix_of_a_waiting_prompt_counts():
    share = ChunkShare()
    share.continue_long(1000, 1000)
    cached, long = Prompt(300, cached=290), Prompt(1000)
    made = adder(110.0, Decodes(10, mixed=True), [cached], share)
    made.add_chunked_req(long)
    add(made, cached, has_chunked=True)
    assert tokens(made) == [88, 10]


def test_the_end_of_a_long_prompt_leaves_room_for_the_queue():
    share = ChunkShare()
    made = adder(110.0, Decodes(10, mixed=True), [], share)
    share.continue_long(500, 1000)
    assert made.add_chunked_req(Prompt(40)) is None
    assert share.credit == 0
    add(made, Prompt(300))
    assert tokens(made) == [40, 60]
    assert share.credit == 60, "the first chunk of the next long prompt earns credit"


@pytest.fixture
def preempted(monkeypatch):
    """The prompts for which SGLang preempts requests."""
    found = []
    monkeypatch.setattr(PrefillAdder, "preempt_to_schedule", lambda self, req: found.append(req) or True)
    return found


def test_nothing_is_preempted_for_a_prompt_that_does_not_pass_a_long_one(preempted):
    share, short, medium, long = ChunkShare(), Prompt(30), Prompt(200), Prompt(1000)
    share.continue_long(500, 1000)
    made = adder(110.0, Decodes(10, mixed=True), [medium, short], share)
    made.add_chunked_req(long)
    assert not made.preempt_to_schedule(medium)
    assert made.preempt_to_schedule(short)
    assert preempted == [short]


def test_nothing_is_preempted_if_the_step_has_no_room(preempted):
    made = adder(110.0, Decodes(10, mixed=True))
    first, second, third = Prompt(40), Prompt(60), Prompt(4)
    for req in (first, second):
        assert made.preempt_to_schedule(req)
        add(made, req)
    assert not made.preempt_to_schedule(third)
    assert made.rem_chunk_tokens > 0, "SGLang's chunk has room"
    assert preempted == [first, second]


def test_nothing_is_preempted_after_a_prompt_that_will_continue(preempted):
    made = adder(112.0, Decodes(10, mixed=True))
    add(made, Prompt(600))
    assert tokens(made) == [100], "two tokens of room are left"
    assert not made.preempt_to_schedule(Prompt(2))
    assert preempted == []


def test_a_long_prompt_that_ends_leaves_its_room_to_a_preempting_one(preempted):
    made = adder(110.0, Decodes(10, mixed=True))
    assert made.add_chunked_req(Prompt(40)) is None
    assert made.preempt_to_schedule(short := Prompt(30))
    assert preempted == [short]


@pytest.mark.parametrize(("most", "expected"), [(None, [100 - 32 - 20, 2]), (2, [100 - 32, 1]), (1, [100, 0])])
def test_no_tokens_are_kept_for_more_prompts_than_a_step_takes(most, expected):
    share = ChunkShare()
    share.continue_long(500, 1000)
    made = adder(110.0, Decodes(10, mixed=True), [Prompt(30), Prompt(20)], share, most=most)
    made.add_chunked_req(Prompt(1000))
    assert [*tokens(made), len(made.chosen)] == expected
    assert share.credit == 500 + expected[0] - (100 - expected[0])


def test_no_tokens_are_kept_for_a_prompt_whose_adapter_does_not_fit():
    """Two adapters fit. SGLang counts those of the long prompt, of decodes and of the prompts before."""
    share = ChunkShare()
    share.continue_long(500, 1000)
    waiting = [Prompt(10, adapter=name) for name in ("c", "b", "c", "a", "b")]
    fits = lambda prompt, adapters: len({prompt.lora_id, *adapters}) <= 2  # noqa: E731
    made = adder(110.0, Decodes(10, mixed=True), waiting, share, adapter_fits=fits)
    made.running_batch.reqs.append(Prompt(1, adapter="b"))
    made.add_chunked_req(Prompt(1000, adapter="a"))
    assert made.chosen == {waiting[i].rid for i in (1, 3, 4)}
    assert tokens(made) == [100 - 3 * 12]
