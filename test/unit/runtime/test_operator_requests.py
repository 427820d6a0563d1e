"""Requests of operators that would end a rank: what is refused, and what a rank leaves undone."""

from __future__ import annotations

import asyncio
import math
import re
from types import SimpleNamespace

import pytest
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers import tp_worker as stock_worker
from sglang.srt.managers.io_struct import (
    InitWeightsSendGroupForRemoteInstanceReqInput,
    InitWeightsUpdateGroupReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoRAUpdateOutput,
    ProfileReq,
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqInput,
    SlowDownReqInput,
    UpdateWeightsFromTensorReqInput,
)
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils import MultiprocessingSerializer
from sglang_shift.errors import RequestRefused
from sglang_shift.runtime import operator_requests, tp_worker
from sglang_shift.runtime.released_memory import ShiftWeightUpdaterManager
from sglang_shift.runtime.tokenizer_manager import ShiftTokenizerManager, ShiftTokenizerWorker
from sglang_shift.runtime.tp_worker import ShiftTpModelWorker

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


def adapter(payloads):
    return LoadLoRAAdapterFromTensorsReqInput(lora_name="a", config_dict={}, serialized_named_tensors=[b""] * payloads)


def test_each_rank_needs_its_tensors_of_an_adapter(server, ask):
    answer = ask("load_lora_adapter_from_tensors", adapter(1))
    assert not answer.success
    assert answer.error_message == "serialized_named_tensors has 1 and must have one for each of 2 ranks"
    assert ask("load_lora_adapter_from_tensors", adapter(2)) == "sent"


@pytest.mark.parametrize("name", ["", "mine"])
def test_a_group_of_a_trainer_has_a_name(ask, name):
    """SGLang's ranks assert it."""
    where = {"master_address": "localhost", "master_port": 1, "rank_offset": 1, "world_size": 3}
    answer = ask("init_weights_update_group", InitWeightsUpdateGroupReqInput(**where, group_name=name))
    assert answer == ("sent" if name else (False, "group_name is empty; give the group a name"))


@pytest.fixture
def worker(monkeypatch):
    """The worker of one of two ranks. ``others`` is whether the other rank has loaded an adapter."""
    mine = ShiftTpModelWorker.__new__(ShiftTpModelWorker)
    mine.unloaded, mine.others = [], True
    loads = LoRAUpdateOutput(success=True)
    mine._model_runner = SimpleNamespace(
        load_lora_adapter_from_tensors=lambda *_: loads, unload_lora_adapter=mine.unloaded.append
    )
    monkeypatch.setattr(tp_worker, "from_all_ranks", lambda own: [own, [mine.others]])
    monkeypatch.setattr(stock_worker, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
    return mine


def tensors_of_adapter(payload, **fields):
    return LoadLoRAAdapterFromTensorsReqInput(
        lora_name="a", lora_id="1", config_dict={}, serialized_named_tensors=[payload], **fields
    )


GOOD = MultiprocessingSerializer.serialize({})  # an adapter without tensors


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (adapter(0), "the tensors of adapter 'a' do not load: IndexError"),
        (tensors_of_adapter(b"x"), "the tensors of adapter 'a' do not load: UnpicklingError"),
        (tensors_of_adapter(GOOD, expected_checksums={"a": "x"}), "the tensors of adapter 'a' do not load: .*MISMATCH"),
    ],
)
def test_an_adapter_that_a_rank_cannot_read(worker, caplog, request_, message):
    answer = worker.load_lora_adapter_from_tensors(request_)
    assert not answer.success and re.match(message, answer.error_message) and not worker.unloaded
    assert answer.error_message in caplog.text


def test_an_adapter_that_another_rank_cannot_read(worker):
    request_ = tensors_of_adapter(GOOD)
    assert worker.load_lora_adapter_from_tensors(request_).success and not worker.unloaded
    worker.others = False
    answer = worker.load_lora_adapter_from_tensors(request_)
    assert not answer.success and answer.error_message.startswith("rank 1 could not load the adapter")
    assert [ref.lora_id for ref in worker.unloaded] == ["1"]


def test_no_rank_joins_a_group_for_an_export(worker):
    """SGLang's ranks assert that there is a port for each of them, and then wait for a receiver."""
    where = {"master_address": "localhost", "ports": "1", "group_rank": 0, "world_size": 2}
    request_ = InitWeightsSendGroupForRemoteInstanceReqInput(**where, group_name="")
    assert worker.init_weights_send_group_for_remote_instance(request_) == (False, tp_worker.EXPORT_REFUSED)


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
