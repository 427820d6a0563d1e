"""Requests that would end a rank are refused before a rank sees them."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import GenerateReqInput, SetInternalStateReq
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_shift import admission
from sglang_shift.scheduler import ShiftScheduler
from sglang_shift.tokenizer import ShiftTokenizerManager, ShiftTokenizerWorker

MANAGERS = (ShiftTokenizerManager, ShiftTokenizerWorker)
VOCAB = 4096
MODEL = SimpleNamespace(vocab_size=VOCAB, hidden_size=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize(
    ("request_", "ids", "served"),
    [
        ({"text": ""}, [], False),
        ({"input_ids": []}, [], False),
        ({"input_embeds": []}, None, False),
        ({"input_ids": [1, 2], "input_embeds": []}, [1, 2], False),  # the ranks take the embeddings' length
        ({"input_ids": [1]}, [1], True),
        ({"input_embeds": [[0.5]]}, None, True),
        ({"input_ids": [], "session_params": {"id": "a"}}, [], True),  # the session may have tokens
        ({"text": "", "image_data": ["a"]}, [], True),  # the image becomes tokens
    ],
)
def test_a_request_has_tokens(monkeypatch, manager, request_, ids, served):
    monkeypatch.setattr(TokenizerManager, "_validate_one_request", lambda *_: None)
    validate = manager.__new__(manager)._validate_one_request
    if served:
        validate(GenerateReqInput(**request_), ids)
    else:
        with pytest.raises(ValueError, match="the request has no tokens; give a text"):
            validate(GenerateReqInput(**request_), ids)


def test_a_rank_never_runs_a_request_without_tokens(monkeypatch):
    """However it got there: SGLang answers what is marked so, and runs one token of it."""

    class Req:
        def __init__(self, ids):
            self.origin_input_ids, self.aborted = array("q", ids), None

        def set_finish_with_abort(self, message):
            self.aborted = message

    queue = []
    monkeypatch.setattr(Scheduler, "_add_request_to_queue", lambda self, req, is_retracted=False: queue.append(req))
    for ids in ([], [1]):
        ShiftScheduler.__new__(ShiftScheduler)._add_request_to_queue(Req(ids))
    assert [req.aborted for req in queue] == [admission.NO_TOKENS, None]


def test_what_a_request_raises_is_its_answer(monkeypatch):
    """On every rank alike, as all of them have the same requests; rank 0's answer is the one that is sent."""

    def broken(self, request):
        raise RuntimeError("dictionary changed size during iteration")

    sent = []
    monkeypatch.setattr(Scheduler, "handle_generate_request", broken)
    monkeypatch.setattr(Scheduler, "send_abort_output", lambda self, abort, request: sent.append((abort, request)))
    request = SimpleNamespace(rid="a")
    ShiftScheduler.__new__(ShiftScheduler).handle_generate_request(request)
    ((abort, of),) = sent
    assert of is request and abort.rid == "a"
    assert abort.finished_reason["status_code"] == 400
    assert "cannot be run: dictionary changed size during iteration; correct it" in abort.finished_reason["message"]


@pytest.mark.parametrize("params", [{"n": 2**31}, {"n": 2**63}, [{"n": 1}, {"n": 100_000}]])
@pytest.mark.parametrize("manager", MANAGERS)
def test_more_samples_than_can_be_made(manager, params):
    request = GenerateReqInput(input_ids=[1], sampling_params=params)
    with pytest.raises(ValueError, match=r"n is .* must be at most 16384; send several requests"):
        manager.__new__(manager).generate_request(request)


@pytest.mark.parametrize("params", [None, {}, {"n": 16_384}, {"n": None}, {"n": "x"}, [{"n": 2}, {}], [None], 5])
def test_samples_that_are_left_to_sglang(params):
    admission.check_samples(params)


def tokenized(**values):
    """A request of one token, with ``values`` for its fields or its sampling parameters."""
    defaults = {"input_ids": [1], "input_embeds": None, "mm_inputs": None, "positional_embed_overrides": None}
    defaults |= {"logprob_start_len": -1, "top_logprobs_num": 0}
    fields = {name: values.pop(name) for name in defaults if name in values}
    request = SimpleNamespace(**{**defaults, **fields}, sampling_params=SamplingParams(**values))
    return request


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"input_ids": [5, -1]}, "input_ids has -1"),
        ({"input_ids": [5, VOCAB, 6]}, f"input_ids has {VOCAB}"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids has -1"),
        ({"stop_token_ids": [VOCAB]}, f"stop_token_ids has {VOCAB}"),
        ({"positional_embed_overrides": {}}, "positional_embed_overrides has tensors"),
        ({"input_embeds": [[0.1, 0.2], [0.1]]}, "input_embeds has a row of 1"),
        ({"logprob_start_len": -2}, "logprob_start_len is -2"),
        ({"top_logprobs_num": -1}, "top_logprobs_num is -1"),
        ({"top_logprobs_num": VOCAB + 1}, f"top_logprobs_num is {VOCAB + 1}"),
    ],
)
def test_values_that_do_not_fit(values, reason):
    with pytest.raises(ValueError, match=reason):
        admission.check_values(tokenized(**values), MODEL)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"input_ids": None, "input_embeds": [[0.1, 0.2]]},
        {"input_ids": [0, VOCAB - 1]},
        {"input_ids": [VOCAB], "mm_inputs": "an image"},
        {"top_k": -1},
        {"top_k": 2**31 - 1},
        {"stop_token_ids": [0, VOCAB - 1]},
        {"logprob_start_len": 0},
        {"top_logprobs_num": VOCAB},
    ],
)
def test_values_that_fit(values):
    admission.check_values(tokenized(**values), MODEL)


def test_embeddings_need_a_model_in_bfloat16():
    """SGLang makes them bfloat16 whatever the model's dtype is."""
    model = SimpleNamespace(**{**vars(MODEL), "dtype": torch.float32})
    with pytest.raises(ValueError, match=r"served in torch\.float32; give --dtype bfloat16"):
        admission.check_values(tokenized(input_embeds=[[0.1, 0.2]]), model)


def test_a_message_that_no_rank_could_read(monkeypatch):
    """With SGLANG_USE_PICKLE_IPC=0 the ranks check the types of what they read."""
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", False)
    message = SetInternalStateReq(server_args={"shift_threshold": 5})
    admission.check_message(message)
    message.server_args = {"shift_threshold": "five"}
    with pytest.raises(ValueError):
        io_struct.msgpack_decode(io_struct.msgpack_encode(message))
    with pytest.raises(ValueError, match=r"cannot be sent to the ranks: .*correct that value"):
        admission.check_message(message)
