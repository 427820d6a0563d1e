"""Requests that would end a rank are refused before a rank sees them."""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import (
    EmbeddingReqInput,
    GenerateReqInput,
    SetInternalStateReq,
    TokenizedEmbeddingReqInput,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor, DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_shift.runtime import admission
from sglang_shift.runtime.scheduler import ShiftScheduler
from sglang_shift.runtime.tokenizer_manager import ShiftTokenizerManager, ShiftTokenizerWorker

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


def make_scheduler(monkeypatch, kind, handle, takes_rows=True):
    """A scheduler whose method of SGLang for a ``kind`` of requests is ``handle``, and the answers that it sends."""
    sent = []
    monkeypatch.setattr(Scheduler, f"handle_{kind}_request", handle)
    monkeypatch.setattr(Scheduler, "send_abort_output", lambda self, abort, request: sent.append((abort, request)))
    scheduler = ShiftScheduler.__new__(ShiftScheduler)
    scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(takes_rows=takes_rows, model="a model"))
    return scheduler, sent


@pytest.mark.parametrize("kind", ["generate", "embedding"])
def test_what_a_request_raises_is_its_answer(monkeypatch, kind):
    """On every rank alike, as all of them have the same requests; rank 0's answer is the one that is sent."""

    def broken(self, request):
        raise RuntimeError("dictionary changed size during iteration")

    scheduler, sent = make_scheduler(monkeypatch, kind, broken)
    request = SimpleNamespace(rid="a", input_embeds=None, positional_embed_overrides=None)
    getattr(scheduler, f"handle_{kind}_request")(request)
    ((abort, of),) = sent
    assert of is request and abort.rid == "a"
    assert abort.finished_reason["status_code"] == 400
    assert "cannot be run: dictionary changed size during iteration; correct it" in abort.finished_reason["message"]


@pytest.mark.parametrize("takes_rows", [True, False])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("generate", {"input_embeds": [[0.5]], "session_params": None}),
        ("generate", {"input_embeds": None, "positional_embed_overrides": "rows"}),
        ("embedding", {"positional_embed_overrides": "rows"}),
    ],
)
def test_rows_for_a_model_that_takes_none(monkeypatch, kind, fields, takes_rows):
    """Its forward has no argument for them, and so the step raised an error."""
    handled = []
    scheduler, sent = make_scheduler(monkeypatch, kind, lambda self, request: handled.append(request), takes_rows)
    getattr(scheduler, f"handle_{kind}_request")(SimpleNamespace(rid="a", **fields))
    assert len(handled) == takes_rows and len(sent) == (not takes_rows)
    for abort, _ in sent:
        assert "str takes no embeddings in place of tokens; send tokens" in abort.finished_reason["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"input_ids": [1], "sampling_params": {"n": 2**31}},
        {"input_ids": [1], "sampling_params": {"n": 2**63}},
        {"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 100_000}]},
        {"input_ids": [[1]] * 1000, "sampling_params": {"n": 17}},
        {"text": ["a"] * 1000, "sampling_params": {"n": 17}},
    ],
)
@pytest.mark.parametrize("manager", MANAGERS)
def test_more_samples_than_can_be_made(manager, fields):
    with pytest.raises(ValueError, match=r"n is .* must be at most \d+; send several requests"):
        manager.__new__(manager).generate_request(GenerateReqInput(**fields))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (GenerateReqInput(input_ids=[1]), "this model pools and does not generate; send the request to /v1/embeddings"),
        (EmbeddingReqInput(input_ids=[]), "the request has no tokens"),
        (EmbeddingReqInput(input_ids=[1]), None),
        (EmbeddingReqInput(text="a"), None),
    ],
)
@pytest.mark.parametrize("manager", MANAGERS)
def test_requests_to_a_model_that_pools(monkeypatch, manager, request_, reason):
    """A step of new tokens ends a rank of such a model."""
    monkeypatch.setattr(TokenizerManager, "generate_request", lambda *_: "answers")
    mine = manager.__new__(manager)
    mine.is_generation = False
    if reason is None:
        assert mine.generate_request(request_) == "answers"
    else:
        with pytest.raises(ValueError, match=reason):
            mine.generate_request(request_)
    mine.is_generation = True
    assert mine.generate_request(request_) == "answers"  # SGLang checks it


@pytest.mark.parametrize("params", [None, {}, {"n": 16_384}, {"n": None}, {"n": "x"}, [{"n": 2}, {}], [None], 5])
def test_samples_that_are_left_to_sglang(params):
    admission.check_samples(SimpleNamespace(text="a", sampling_params=params))


@pytest.mark.parametrize("prompts", [{"input_ids": []}, {"text": []}, {"text": ""}, {"input_ids": [[]]}])
def test_samples_of_no_prompt(prompts):
    admission.check_samples(SimpleNamespace(**prompts, sampling_params={"n": 2}))


def test_many_prompts_of_one_sample_each():
    admission.check_samples(GenerateReqInput(input_ids=[[1]] * 20_000, sampling_params={"n": 1}))


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """Flags of the server, which a test can change."""
    flags = SimpleNamespace(speculative_algorithm=None, enable_deterministic_inference=False)
    monkeypatch.setattr(admission, "get_spec", lambda: flags)
    monkeypatch.setattr(admission, "get_exec", lambda: SimpleNamespace(deterministic=flags))
    return flags


class NotCallable:
    to_str = classmethod(CustomLogitProcessor.to_str.__func__)


def tokenized(**values):
    """A request of one token, with ``values`` for its fields or its sampling parameters."""
    defaults = {"input_ids": [1], "input_embeds": None, "mm_inputs": None, "positional_embed_overrides": None}
    defaults |= {"logprob_start_len": -1, "top_logprobs_num": 0, "return_logprob": False, "token_indices_to_pool": None}
    defaults |= {"custom_logit_processor": None}
    fields = {name: values.pop(name) for name in defaults if name in values}
    request = SimpleNamespace(**{**defaults, **fields}, sampling_params=SamplingParams(**values))
    return request


def rows(width, positions):
    """Rows of ``width`` for the tokens at ``positions``."""
    return PositionalEmbeds(torch.ones(len(positions), width), positions)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"input_ids": [5, -1]}, "input_ids has -1"),
        ({"input_ids": [5, VOCAB, 6]}, f"input_ids has {VOCAB}"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids has -1"),
        ({"stop_token_ids": [VOCAB]}, f"stop_token_ids has {VOCAB}"),
        ({"positional_embed_overrides": {}}, "positional_embed_overrides has tensors"),
        (
            {"positional_embed_overrides": rows(1, [0])},
            r"have the shape \(1, 1\), but each needs the model's 2 numbers",
        ),
        ({"positional_embed_overrides": rows(3, [0])}, r"have the shape \(1, 3\)"),
        ({"positional_embed_overrides": PositionalEmbeds(torch.ones(1), [0])}, r"have the shape \(1,\)"),
        ({"positional_embed_overrides": PositionalEmbeds("no tensor", [0])}, r"have the shape \(\)"),
        ({"positional_embed_overrides": rows(2, [1])}, "has a position not among the 1 tokens"),
        ({"positional_embed_overrides": rows(2, [-1])}, "has a position not among the 1 tokens"),
        ({"input_embeds": [[0.1, 0.2], [0.1]]}, "input_embeds has a row of 1"),
        ({"logprob_start_len": -2}, "logprob_start_len is -2"),
        ({"top_logprobs_num": -1}, "top_logprobs_num is -1"),
        ({"top_logprobs_num": VOCAB + 1}, f"top_logprobs_num is {VOCAB + 1}"),
        ({"custom_logit_processor": "no JSON"}, "custom_logit_processor cannot be made"),
        ({"custom_logit_processor": '{"callable": "00"}'}, "custom_logit_processor cannot be made"),
        ({"custom_logit_processor": CustomLogitProcessor.to_str()}, "custom_logit_processor cannot be made"),
        ({"custom_logit_processor": NotCallable.to_str()}, "custom_logit_processor cannot be called"),
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
        {"positional_embed_overrides": rows(2, [0])},
        {"positional_embed_overrides": rows(2, [5]), "mm_inputs": "an image"},
        {"top_k": -1},
        {"top_k": 2**31 - 1},
        {"stop_token_ids": [0, VOCAB - 1]},
        {"logprob_start_len": 0},
        {"top_logprobs_num": VOCAB},
        {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()},
    ],
)
def test_values_that_fit(values):
    admission.check_values(tokenized(**values), MODEL)


@pytest.mark.parametrize(
    ("flag", "values", "reason"),
    [
        ("speculative_algorithm", {"min_p": 0.1}, "min_p is 0.1, but --speculative-algorithm"),
        ("speculative_algorithm", {"min_p": 0.1, "temperature": 0}, None),  # greedy
        ("speculative_algorithm", {"top_k": 5, "top_p": 0.9, "logit_bias": {"1": 5.0}, "sampling_seed": 7}, None),
        (
            "speculative_algorithm",
            {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()},
            "custom_logit_processor is not applied with --speculative-algorithm",
        ),
        ("enable_deterministic_inference", {"min_p": 0.1}, "min_p is 0.1, but --enable-deterministic-inference"),
        ("enable_deterministic_inference", {"min_p": 0.1, "temperature": 0}, "but --enable-deterministic-inference"),
        ("enable_deterministic_inference", {"top_k": 5, "top_p": 0.9, "sampling_seed": 7}, None),
        (None, {"min_p": 0.1}, None),
    ],
)
def test_sampling_that_flags_do_not_have(flags, flag, values, reason):
    if flag:
        setattr(flags, flag, "NGRAM" if flag == "speculative_algorithm" else True)
    if reason is None:
        admission.check_values(tokenized(**values), MODEL)
    else:
        with pytest.raises(ValueError, match=reason):
            admission.check_values(tokenized(**values), MODEL)


class Wanted(msgspec.Struct):
    sampling_params: SamplingParams
    return_logprob: bool = False
    custom_logit_processor: str | None = None
    token_ids_logprob: list[int] | None = None
    input_ids: object = None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"stream_interval": "x"}, "stream_interval has .*Expected `int | null`, got `str`"),
        ({"logit_bias": {"1": "x"}}, "logit_bias has .*Expected `float`, got `str`"),
        ({"logit_bias": {"1": None}}, "logit_bias has "),
        ({"logit_bias": [1]}, "logit_bias has "),
        ({"logit_bias": {(1, 2): 2.0}}, "logit_bias has "),
        ({"skip_special_tokens": "x"}, "skip_special_tokens has .*Expected `bool`, got `str`"),
        ({"max_new_tokens": 4.5}, "max_new_tokens has "),
        ({"json_schema": {"type": "object"}}, "json_schema has "),
    ],
)
def test_sampling_parameters_of_another_type(values, reason):
    """SGLang pickles requests, so that no rank checks them."""
    assert io_struct._USE_PICKLE_IPC
    with pytest.raises(ValueError, match=reason):
        admission.convert_types(Wanted(SamplingParams(**values)))


@pytest.mark.parametrize("values", [{"return_logprob": [True]}, {"custom_logit_processor": ["x"]}])
def test_a_list_for_a_single_request(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} has a value of another type"):
        admission.convert_types(Wanted(SamplingParams(), **values))


def test_values_that_only_look_different():
    """A 1 for True ended the detokenizer. What a processor of the user's reads is the user's affair."""
    params = {"max_new_tokens": 4.0, "skip_special_tokens": 1, "ignore_eos": 0, "stop_token_ids": [5, 6.0]}
    deep = {"a": {"b": [1, {"c": 2}]}}
    request = Wanted(SamplingParams(**params, logit_bias={"1": 2}, custom_params=deep), input_ids=array("q", [1]))
    admission.convert_types(request)
    seen = request.sampling_params
    assert (seen.max_new_tokens, seen.skip_special_tokens, seen.ignore_eos) == (4, True, False)
    assert type(seen.max_new_tokens) is int and seen.stop_token_ids == {5, 6} and seen.logit_bias == {"1": 2.0}
    assert seen.custom_params is deep and request.input_ids == array("q", [1])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"logit_bias": {5: 2.0}}, {"logit_bias": {"5": 2.0}}),
        ({"logit_bias": {np.int64(5): np.float32(0.5)}}, {"logit_bias": {"5": 0.5}}),
        ({"temperature": np.float64(0.7), "top_p": np.float32(0.5)}, {"temperature": 0.7, "top_p": 0.5}),
        ({"max_new_tokens": np.int64(4), "top_k": np.int32(3)}, {"max_new_tokens": 4, "top_k": 3}),
        ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
        ({"stop": ("a", np.str_("b"))}, {"stop": ["a", "b"]}),
    ],
)
def test_values_of_python_and_numpy(values, expected):
    """SGLang takes them from the Python API. What the ranks get has the types of JSON."""
    request = Wanted(SamplingParams(**values))
    admission.convert_types(request)
    for name, value in expected.items():
        seen = getattr(request.sampling_params, name)
        assert seen == value and type(seen) is type(value)
        assert json.dumps(seen) == json.dumps(value)


def test_lists_of_numpy():
    request = Wanted(SamplingParams(), token_ids_logprob=np.array([5, 6]))
    admission.convert_types(request)
    assert request.token_ids_logprob == [5, 6] and type(request.token_ids_logprob[0]) is int


def test_all_fields_of_a_request_have_types_that_are_known():
    for kind in (io_struct.TokenizedGenerateReqInput, io_struct.TokenizedEmbeddingReqInput, SamplingParams):
        assert admission._types(kind).keys() == set(kind.__struct_fields__)
    assert set(admission.UNCHECKED_FIELDS) <= admission._types(io_struct.TokenizedGenerateReqInput).keys()


def test_labels_that_no_metric_has(monkeypatch):
    """SGLang gives them to Prometheus while it handles answers, and an error there ends the server."""
    seen = SimpleNamespace(enable_metrics=True, tokenizer_metrics_allowed_custom_labels=["team"])
    monkeypatch.setattr(admission, "get_observability", lambda: seen)
    for labels in (None, {}, {"team": "a"}):
        admission.check_labels(labels)
    with pytest.raises(ValueError, match="custom_labels has 'x', which is not in --tokenizer-metrics-allowed"):
        admission.check_labels({"team": "a", "x": "b"})
    seen.enable_metrics = False  # then nobody reads them
    admission.check_labels({"x": "b"})


@pytest.mark.parametrize(
    ("settings", "values", "reason"),
    [
        ((128, True), {}, "needs --chunked-prefill-size -1 and --disable-radix-cache"),
        ((-1, False), {}, "needs --chunked-prefill-size -1 and --disable-radix-cache"),
        ((-1, True), {"token_indices_to_pool": [3]}, "not among the 3 tokens"),
        ((-1, True), {"token_indices_to_pool": [-1]}, "not among the 3 tokens"),
        ((-1, True), {"token_indices_to_pool": []}, "not among the 3 tokens"),
        ((-1, True), {"return_logprob": False}, "needs max_new_tokens 0"),
        ((-1, True), {"logprob_start_len": 1}, "needs max_new_tokens 0"),
        ((-1, True), {"max_new_tokens": 5}, "needs max_new_tokens 0"),
        ((-1, True), {}, None),
    ],
)
def test_positions_to_read_logprobs_at(monkeypatch, settings, values, reason):
    chunk, no_cache = settings
    monkeypatch.setattr(admission, "get_schedule", lambda: SimpleNamespace(chunked_prefill_size=chunk))
    monkeypatch.setattr(admission, "get_memory", lambda: SimpleNamespace(disable_radix_cache=no_cache))
    fields = {"input_ids": [1, 2, 3], "token_indices_to_pool": [0, 2], "return_logprob": True}
    request = tokenized(**{**fields, "logprob_start_len": 0, "max_new_tokens": 0, **values})
    if reason is None:
        admission.check_values(request, MODEL)
    else:
        with pytest.raises(ValueError, match=reason):
            admission.check_values(request, MODEL)


@pytest.mark.parametrize("positions", [[3], [-1], []])
def test_positions_at_which_a_model_pools(monkeypatch, positions):
    """A classifier reads its scores there, and a row that does not exist ends the rank."""
    monkeypatch.setattr(admission, "get_schedule", lambda: SimpleNamespace(chunked_prefill_size=-1))
    monkeypatch.setattr(admission, "get_memory", lambda: SimpleNamespace(disable_radix_cache=True))
    request = TokenizedEmbeddingReqInput(
        rid="0", input_text="", input_ids=array("q", [1, 2, 3]), mm_inputs=None, token_type_ids=None,
        sampling_params=SamplingParams(max_new_tokens=0), token_indices_to_pool=[0, 2],
    )  # fmt: skip
    admission.check_values(request, MODEL)
    request.token_indices_to_pool = positions
    with pytest.raises(ValueError, match="not among the 3 tokens"):
        admission.check_values(request, MODEL)


def test_embeddings_become_those_of_tokens():
    request = SimpleNamespace(input_embeds=[[0.1, 0.2], [0.3, 0.4]], input_ids=None, session_params=None)
    request.positional_embed_overrides = None
    admission.replace_input_embeds(request)
    assert request.input_embeds is None and len(request.input_ids) == 2
    overrides = request.positional_embed_overrides
    assert overrides.positions == [0, 1] and torch.equal(overrides.embeds, torch.tensor([[0.1, 0.2], [0.3, 0.4]]))


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


@pytest.mark.parametrize("folder", ["/dev/null/x", "nul\0", "file"])
def test_a_profile_that_could_not_be_written(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .* cannot be written .*; give another"):
        admission.check_folder(folder)


def test_profiles_that_can_be_written(tmp_path, monkeypatch):
    admission.check_folder(str(tmp_path / "a" / "b"))
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path / "c"))
    admission.check_folder(None)
    assert (tmp_path / "c").is_dir() and not list((tmp_path / "c").iterdir())


def test_levels_of_logging():
    for level in (None, 0, 3):
        admission.check_logging(level)
    for level in (-1, 4, 99):
        with pytest.raises(ValueError, match=f"log_requests_level is {level} and must be between 0 and 3"):
            admission.check_logging(level)


def test_weights_in_a_format_that_does_not_exist():
    """SGLang raises an error in the rank, which ends it; the base weights stay as they are."""
    from sglang_shift.runtime.model_runner import ShiftWeightUpdater

    updater = ShiftWeightUpdater.__new__(ShiftWeightUpdater)  # without a runner: nothing may be asked of it
    done, message = updater.update_weights_from_disk("/nowhere", "x", recapture_cuda_graph=False)
    assert not done and message.startswith("load_format 'x' does not update weights; give one of auto, pt, safetensors")


@pytest.mark.parametrize(("shards", "width", "served"), [(1, 4, True), (2, 1, True), (2, 2, False)])
def test_beams_need_a_cache_that_is_not_divided_by_token(monkeypatch, shards, width, served):
    monkeypatch.setattr(admission, "get_parallel", lambda: SimpleNamespace(dcp_size=shards))
    if served:
        admission.check_beams(width)
    else:
        with pytest.raises(ValueError, match="beam_width is 2, but beams need a server without --dcp-size 2"):
            admission.check_beams(width)
