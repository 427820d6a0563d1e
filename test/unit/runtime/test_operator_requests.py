"""Requests of operators that would end a rank: what is refused, and what a rank leaves undone."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import (
    ProfileReq,
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqInput,
    SlowDownReqInput,
    UpdateWeightsFromTensorReqInput,
)
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang_shift.errors import RequestRefused
from sglang_shift.runtime import operator_requests
from sglang_shift.runtime.released_memory import ShiftWeightUpdaterManager
from sglang_shift.runtime.tokenizer_manager import ShiftTokenizerManager, ShiftTokenizerWorker

RELEASE, RESUME = ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput


@pytest.fixture
def server(monkeypatch):
    """The settings of a server on GPUs, as the tokenizer's process sees them."""
    settings = SimpleNamespace(device="cuda", tp_size=2)
    monkeypatch.setattr(operator_requests, "get_device", lambda: settings)
    monkeypatch.setattr(operator_requests, "get_parallel", lambda: settings)
    moe = SimpleNamespace(expert_distribution_recorder_mode=None)
    monkeypatch.setattr(operator_requests, "get_exec", lambda: settings)
    settings.moe, settings.features = moe, SimpleNamespace(enable_memory_saver=False)
    return settings


@pytest.fixture(params=[ShiftTokenizerManager, ShiftTokenizerWorker])
def ask(request, monkeypatch):
    """Calls a method of a tokenizer manager, and returns the answer: of the ranks, if it gets there."""
    manager = request.param.__new__(request.param)

    def call(name, *args):
        async def answer(*_):
            return "sent"

        monkeypatch.setattr(TokenizerManager, name, answer)
        return asyncio.run(getattr(manager, name)(*args))

    return call


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("release_memory_occupation", RELEASE(tags=["x"]), "tags has 'x'; give kv_cache, weights, cuda_graph"),
        ("resume_memory_occupation", RESUME(tags=["weights", "x"]), "tags has 'x'"),
        ("resume_memory_occupation", RESUME(tags=["weights", "weights"]), "tags has 'weights' twice"),
        ("slow_down", SlowDownReqInput(forward_sleep_time=1e300), "forward_sleep_time is 1e.300 and must be at most"),
        ("slow_down", SlowDownReqInput(forward_sleep_time=math.nan), "forward_sleep_time is nan"),
        ("start_profile", ProfileReq(profile_prefix="../x"), "profile_prefix '../x' is no part of a file's name"),
        ("start_profile", ProfileReq(profile_id="a" * 101), "profile_id 'a+' is no part"),
        ("start_profile", ProfileReq(profile_id="\0"), "profile_id .* is no part"),
        ("start_profile", ProfileReq(activities=["CPU", "x"]), "activities has 'x'; give CPU, GPU"),
        ("start_profile", ProfileReq(profile_by_stage=True), "give num_steps"),
    ],
)
def test_what_is_refused(server, ask, name, request_, message):
    with pytest.raises(RequestRefused, match=message) as refusal:
        ask(name, request_)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("release_memory_occupation", RELEASE()),
        ("release_memory_occupation", RELEASE(tags=["weights", "kv_cache"])),
        ("resume_memory_occupation", RESUME(tags=[])),
        ("slow_down", SlowDownReqInput(forward_sleep_time=None)),
        ("slow_down", SlowDownReqInput(forward_sleep_time=0.5)),
        ("start_profile", ProfileReq(profile_prefix="mine", activities=["CPU"], num_steps=2, profile_by_stage=True)),
        ("start_profile", None),
        ("update_weights_from_tensor", UpdateWeightsFromTensorReqInput(serialized_named_tensors=[b"", b""])),
    ],
)
def test_what_is_sent_to_the_ranks(server, ask, name, request_):
    ask(name, request_)


@pytest.mark.parametrize("given", [0, 1])
def test_each_rank_needs_its_tensors(server, ask, given):
    request_ = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[b""] * given)
    done, message = ask("update_weights_from_tensor", request_)
    assert not done and message == f"serialized_named_tensors has {given} and must have one for each of 2 ranks"


@pytest.mark.parametrize("what", ["start", "stop", "dump"])
def test_a_server_without_a_recorder_records_no_experts(server, ask, what):
    with pytest.raises(RequestRefused, match="restart it with --expert-distribution-recorder-mode"):
        ask(f"{what}_expert_distribution_record")
    server.moe.expert_distribution_recorder_mode = "stat"
    ask(f"{what}_expert_distribution_record")


def test_memory_of_gpus_with_cuda(server, monkeypatch):
    monkeypatch.setattr(operator_requests.torch.cuda, "is_available", lambda: True)
    operator_requests.check_profile(ProfileReq(activities=["MEM", "CUDA_PROFILER"]))


def test_no_memory_is_released_on_cpus(server, ask):
    server.device = "cpu"
    for name, request_ in (("release_memory_occupation", RELEASE()), ("resume_memory_occupation", RESUME())):
        with pytest.raises(RequestRefused, match="memory can be released on GPUs only"):
            ask(name, request_)
    server.features.enable_memory_saver = True
    ask("release_memory_occupation", RELEASE())


def updater(idle=True, released=()):
    mine = ShiftWeightUpdaterManager.__new__(ShiftWeightUpdaterManager)
    mine.is_fully_idle = lambda ignore_waiting: idle
    mine.offload_tags, mine.scheduler = set(released), SimpleNamespace(_engine_paused=False)
    return mine


@pytest.mark.parametrize(
    ("name", "mine", "tags", "served"),
    [
        ("release_memory_occupation", updater(idle=False), None, False),
        ("release_memory_occupation", updater(), None, True),
        ("resume_memory_occupation", updater(), None, False),
        ("resume_memory_occupation", updater(released=["weights"]), None, False),
        ("resume_memory_occupation", updater(released=["weights"]), ["kv_cache"], False),
        ("resume_memory_occupation", updater(released=["weights"]), ["weights"], True),
        ("resume_memory_occupation", updater(released=["weights", "kv_cache", "cuda_graph"]), [], True),
    ],
)
def test_what_a_rank_leaves_undone(monkeypatch, caplog, name, mine, tags, served):
    asked = []
    monkeypatch.setattr(SchedulerWeightUpdaterManager, name, lambda self, request: asked.append(request))
    before = set(mine.offload_tags)
    request = RELEASE if name.startswith("release") else RESUME
    getattr(mine, name)(request(tags=tags))
    assert bool(asked) is served and mine.offload_tags == before
    assert (f"sglang_shift: no memory was {name.split('_')[0]}" in caplog.text) is not served


@pytest.mark.parametrize(
    ("released", "tags", "expected"),
    [
        ([], None, [GPU_MEMORY_ALL_TYPES]),
        (["kv_cache"], ["kv_cache"], []),
        (["kv_cache"], ["kv_cache", "weights"], [["weights"]]),
        (["kv_cache"], None, [[tag for tag in GPU_MEMORY_ALL_TYPES if tag != "kv_cache"]]),
        (GPU_MEMORY_ALL_TYPES, None, []),
    ],
)
def test_memory_is_not_released_twice(monkeypatch, caplog, released, tags, expected):
    """SGLang's memory saver ends the process if it pauses memory that is paused."""
    asked = []
    monkeypatch.setattr(
        SchedulerWeightUpdaterManager, "release_memory_occupation", lambda self, request: asked.append(request.tags)
    )
    answer = updater(released=released).release_memory_occupation(RELEASE(tags=tags))
    assert asked == expected
    assert ("was released before" in caplog.text) is bool(released)
    assert expected or isinstance(answer, ReleaseMemoryOccupationReqOutput)
