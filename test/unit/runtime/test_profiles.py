"""Whether a profile runs or will begin, with SGLang's own profiler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import ProfileReq, ProfileReqType
from sglang.srt.managers.scheduler_components import profiler_manager as module
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils import profile_utils
from sglang_shift.runtime.profiles import profile_is_open

STOP = ProfileReq(req_type=ProfileReqType.STOP_PROFILE)


class Profiler:
    """SGLang's profiler manager on a rank that runs one step after the other."""

    def __init__(self, folder: str) -> None:
        self.steps = 0
        self.folder = folder
        self.manager = module.SchedulerProfilerManager(get_forward_ct=lambda: self.steps)

    def ask(self, **fields: object) -> bool:
        """Ask for a profile. Return whether one is open now."""
        values = {"output_dir": self.folder, "activities": ["CPU"], "with_stack": False, "profile_id": "a"}
        assert self.manager._profile(ProfileReq(**values, **fields)).success
        return profile_is_open(self.manager)

    def step(self, mode: ForwardMode = ForwardMode.DECODE) -> bool:
        """Run a step. Return whether a profile is open after it."""
        self.steps += 1
        self.manager._profile_batch_predicate(SimpleNamespace(forward_mode=mode, batch_size=lambda: 1))
        return profile_is_open(self.manager)


@pytest.fixture
def profiler(monkeypatch, tmp_path):
    group = SimpleNamespace(cpu_group=None)
    monkeypatch.setattr(module, "get_dp_tp_group", lambda: group)
    ranks = SimpleNamespace(tp_rank=0, num_dp_ranks=1, pp_size=1, moe_ep_size=1)
    monkeypatch.setattr(module, "get_parallel", lambda: ranks)
    monkeypatch.setattr(module.torch.distributed, "barrier", lambda group: None)
    return lambda: Profiler(str(tmp_path))


def test_no_profile_is_open_before_the_first_one(profiler):
    made = profiler()
    assert not profile_is_open(made.manager) and not made.step()


def test_a_profile_of_some_steps(profiler):
    made = profiler()
    assert made.ask(num_steps=2)
    assert [made.step() for _ in range(4)] == [True, True, False, False]
    assert made.ask(num_steps=1), "the second one"
    assert [made.step() for _ in range(2)] == [True, False]


def test_a_profile_that_begins_later(profiler):
    made = profiler()
    assert made.ask(start_step=3, num_steps=1)
    assert [made.step() for _ in range(5)] == [True, True, True, False, False]


def test_a_profile_that_is_ended_by_hand(profiler):
    made = profiler()
    assert made.ask() and made.step()
    assert made.manager._profile(STOP).success and not profile_is_open(made.manager)


def test_a_profile_of_each_phase(profiler):
    """The prompts end before their steps are complete. Nothing begins after the profile of the decode steps."""
    made = profiler()
    assert made.ask(num_steps=2, profile_by_stage=True)
    assert made.step(ForwardMode.EXTEND)
    assert [made.step() for _ in range(4)] == [True, True, False, False]


def test_a_profile_of_each_phase_by_the_second_profiler(profiler, monkeypatch):
    monkeypatch.setenv("SGLANG_PROFILE_V2", "1")
    monkeypatch.setattr(profile_utils, "get_device", lambda: SimpleNamespace(gpu_id=0, base_gpu_id=0))
    nothing = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(profile_utils._ProfilerBase, "create", staticmethod(lambda **_: nothing))
    made = profiler()
    assert not profile_is_open(made.manager)
    assert made.ask(num_steps=2, profile_by_stage=True)
    assert made.step(ForwardMode.EXTEND)
    assert [made.step() for _ in range(4)] == [True, True, True, False]
