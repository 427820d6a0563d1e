"""Which chunks leave out blocks, whose KV cache they share, and what the ranks agree on."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import msgspec
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.platforms.sparse_attention import QUERY_BLOCK, DroppedMass
from sglang_shift.runtime.reporter import sparse_of
from sglang_shift.runtime.sparse_prefill import EXACT, MIN_PREFIX, SPARSE, SparsePrefill, SparseRequest


def request(**fields):
    plain = {
        "return_logprob": False, "logprob_start_len": -1, "origin_input_ids": [1] * 9000, "return_hidden_states": False,
        "is_prefill_only": False, "multimodal_inputs": None, "session": None, "beam_group": None, "extra_key": None,
        "multi_item_delimiter_indices": None,
    }  # fmt: skip
    return SimpleNamespace(**plain | fields)


def batch_of(*requests, decodes=0, mode=ForwardMode.EXTEND):
    """Requests with the tokens of their prefixes and their new tokens."""
    reqs, prefixes, news = zip(*requests, strict=True)
    return SimpleNamespace(
        forward_mode=mode, reqs=list(reqs), prefix_lens=list(prefixes), extend_lens=list(news),
        decoding_reqs=list(reqs[len(reqs) - decodes :]),
    )  # fmt: skip


def alone(numbers):
    return [numbers]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"return_logprob": True, "logprob_start_len": 9000}, ""),
        ({"return_logprob": True, "logprob_start_len": -1}, ""),
        ({"return_logprob": True, "logprob_start_len": 0}, "it asks for logprobs of its prompt"),
        ({"return_logprob": True, "logprob_start_len": 8999}, "it asks for logprobs of its prompt"),
        ({"return_logprob": False, "logprob_start_len": 0}, ""),
        ({"return_hidden_states": True}, "it asks for hidden states"),
        ({"is_prefill_only": True, "return_logprob": True}, "it asks for scores only"),
        ({"is_prefill_only": True, "multi_item_delimiter_indices": [3]}, "it asks for scores only"),
        ({"is_prefill_only": True}, ""),  # it warms the cache for n answers
        ({"multimodal_inputs": object()}, "it has images"),
        ({"session": object()}, "it is of a session"),
        ({"beam_group": object()}, "it searches with beams"),
    ],
)
@pytest.mark.parametrize("key", [None, "mine", SPARSE, "sparse|mine"])
def test_exact_requests_have_radix_keys_of_their_own(fields, reason, key):
    req = request(**fields, extra_key=key)
    prefill = SparsePrefill(0.1, None, alone)
    prefill.admit(req)
    assert req.shift_sparse.exact == reason
    assert req.extra_key == (EXACT if reason else SPARSE) + (key or "")
    assert not (EXACT + (key or "")).startswith(SPARSE)
    before = (req.shift_sparse, req.extra_key)
    prefill.admit(req)  # it was retracted
    assert (req.shift_sparse, req.extra_key) == before


def test_without_the_flag_nothing_changes():
    prefill, req = SparsePrefill(0.0, SimpleNamespace(sparse=None), alone), request(extra_key="mine")
    prefill.admit(req)
    with prefill.running(batch_of((req, 2 * MIN_PREFIX, 500))) as sparse:
        assert prefill.backend.sparse is None and not sparse
    assert req.extra_key == "mine"
    assert sparse_of(req) is None
    assert prefill.report() is None


def test_which_chunks_leave_out_blocks():
    prefill = SparsePrefill(0.1, None, alone)
    long, short, few, exact, decode = (request() for _ in range(5))
    exact.return_hidden_states = True
    for req in (long, short, few, exact, decode):
        prefill.admit(req)
    step = (
        (long, MIN_PREFIX, 500), (short, MIN_PREFIX - 1, 500), (few, 9000, QUERY_BLOCK - 1), (exact, 9000, 500),
        (decode, 9000, 1),
    )  # fmt: skip
    assert prefill.sparse_chunks(batch_of(*step, decodes=1)) == {0: long.shift_sparse}
    assert prefill.sparse_chunks(batch_of(*step, mode=ForwardMode.DECODE)) == {}


def test_all_ranks_know_what_each_of_them_dropped():
    """Two requests on two ranks. Rank 1's figures arrive with rank 0's."""
    other = SparsePrefill(0.1, SimpleNamespace(sparse=None), alone)
    sent = []
    prefill = SparsePrefill(0.1, SimpleNamespace(sparse=None), lambda numbers: [numbers, sent[-1]])
    mine, theirs = [request(), request()], [request(), request()]
    for req in mine:
        prefill.admit(req)
    for req in theirs:
        other.admit(req)
    other.gather = lambda numbers: sent.append(numbers) or [numbers]
    for part, reqs, mass in ((other, theirs, 0.08), (prefill, mine, 0.02)):
        with part.running(batch_of((reqs[0], 5000, 100), (reqs[1], 5000, 200))) as sparse:
            assert sparse
            step = part.backend.sparse
            assert step.bound == 0.1
            step.records[0].add(torch.tensor([mass, 0.0]), 100, 50)
            step.records[1].add(torch.tensor([mass / 2]), 100, 40)
        assert part.backend.sparse is None
    figures = msgspec.to_builtins(sparse_of(mine[0]))
    assert figures == {
        "tokens": 100, "mean": pytest.approx(0.025), "p99": pytest.approx(0.08), "max": pytest.approx(0.08),
        "computed": 0.5, "exact": "",
    }  # fmt: skip
    assert sparse_of(mine[1]).max == pytest.approx(0.04)
    assert sparse_of(mine[1]).computed == 0.4
    assert prefill.report() == {"bound": 0.1, "prefix": MIN_PREFIX, "chunks": 2}


def test_a_request_that_can_leave_out_little_is_finished_exactly():
    """The ranks decide by the sum of their figures: rank 0 alone leaves out enough."""
    idle = DroppedMass()
    idle.add(torch.zeros(1), 1000, 1000)
    prefill = SparsePrefill(0.1, SimpleNamespace(sparse=None), lambda numbers: [numbers, idle.numbers()])
    req = request()
    prefill.admit(req)
    batch = batch_of((req, 5000, 100))
    for computed in (890, 930):
        assert prefill.sparse_chunks(batch) == {0: req.shift_sparse}
        with prefill.running(batch):
            prefill.backend.sparse.records[0].add(torch.zeros(1), 1000, computed)
    assert req.shift_sparse.exact == "its chunks could leave out too little"
    assert prefill.sparse_chunks(batch) == {}
    assert req.extra_key.startswith(SPARSE), "its KV cache is not exact"


def test_tokens_count_once_although_a_retraction_lets_them_be_computed_again():
    """After it the chunks are others: one begins earlier, and the tokens of the answer are in the last two."""
    prefill = SparsePrefill(0.1, SimpleNamespace(sparse=None), alone)
    req = request(origin_input_ids=[1] * 6000)
    prefill.admit(req)
    counts = []
    for prefix, new in ((5000, 500), (5500, 500), (4900, 700), (5600, 450), (6100, 500)):
        with prefill.running(batch_of((req, prefix, new))):
            prefill.backend.sparse.records[0].add(torch.zeros(1), 1000, 500)
        counts.append(req.shift_sparse.tokens)
    assert counts == [500, 1000, 1100, 1100, 1100]


def test_lower_tokens_count_after_a_retraction_and_an_eviction():
    """The first chunk began behind a cached prefix, which is computed after the eviction."""
    record = SparseRequest()
    for start, end in ((8192, 12_000), (4096, 6144), (6144, 8192), (8192, 12_000)):
        record.count(start, end)
    assert record.tokens == 12_000 - 4096


def test_tokens_by_brute_force():
    random = Random(0)
    for _ in range(50):
        record, counted = SparseRequest(), set()
        for _ in range(10):
            start = random.randrange(40)
            end = start + random.randrange(12)
            record.count(start, end)
            counted.update(range(start, end))
            assert record.tokens == len(counted)


def test_an_error_in_a_step_leaves_the_backend_exact():
    prefill, req = SparsePrefill(0.1, SimpleNamespace(sparse=None), alone), request()
    prefill.admit(req)
    with pytest.raises(KeyError), prefill.running(batch_of((req, 5000, 100))):
        raise KeyError
    assert prefill.backend.sparse is None
