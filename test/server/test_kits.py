"""SGLang's own test kits against our server in shift mode."""

from __future__ import annotations

import unittest
from types import SimpleNamespace

import pytest
from harness import TWO_RANKS
from sglang.test.kits.abort_timeout_kit import AbortAllMixin, RunningTimeoutTwoWaveMixin, WaitingTimeoutMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang_shift.models.demo import demo_model_path
from transformers import AutoTokenizer

SHIFT = ("--tp-size", "2", "--enable-shift-parallel", "--shift-threshold", "8", "--max-running-requests")


@pytest.fixture(scope="class")
def attach(request, servers):
    """Give the kits their `base_url` and `process`."""
    server = servers.get("--model-path", demo_model_path(), *request.cls.flags, env=getattr(request.cls, "env", {}))
    server.set_policy("tokens", 8)
    request.cls.base_url = server.url
    request.cls.process = SimpleNamespace(poll=server.process.poll)
    before = server.state["steps"]
    yield
    assert all(steps > before[mode] for mode, steps in server.state["steps"].items())


@pytest.mark.server(*TWO_RANKS)
@pytest.mark.usefixtures("attach")
class TestContractAbortPauseStop(
    BasicAPIContractMixin, AbortAllMixin, PauseResumeInPlaceMixin, MatchedStopMixin, unittest.TestCase
):
    flags = TWO_RANKS
    model = "default"
    pause_num_requests = 16
    pause_max_new_tokens = 256
    pause_ignore_eos = True
    # The demo model's context; the kit's 16,000 would be refused.
    abort_all_max_new_tokens = 4000

    def test_finish_stop_regex_str(self):
        """The kit's, with words that the demo model says: it knows the standard library, not stories."""
        words = r"name|path|class"
        for run in (self._run_completions_generation, self._run_chat_completions_generation):
            run(max_tokens=1000, stop_regex=words, finish_reason="stop", matched_stop=words)
        end = r"[.!?]\s*$"
        self._run_chat_completions_generation(max_tokens=1000, stop_regex=end, finish_reason="stop", matched_stop=end)

    def test_finish_stop_eos(self):
        """The kit's, with our end-of-turn token in place of Llama 3's: a chat turn ends by itself."""
        tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
        ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        question = "Write is_empty: Return True if the queue is empty."
        self._run_chat_completions_generation(prompt=question, max_tokens=1000, finish_reason="stop", matched_stop=ends)


@pytest.mark.server
@pytest.mark.full
@pytest.mark.usefixtures("attach")
class TestWaitingTimeout(WaitingTimeoutMixin, unittest.TestCase):
    flags = (*SHIFT, "1")
    env = {"SGLANG_REQ_WAITING_TIMEOUT": "0.001"}  # noqa: RUF012

    def test_both_modes(self):
        import requests

        body = {"input_ids": list(range(100, 130)), "sampling_params": {"max_new_tokens": 2}}
        assert requests.post(self.base_url + "/generate", json=body, timeout=60).status_code == 200


@pytest.mark.server
@pytest.mark.full
@pytest.mark.usefixtures("attach")
class TestRunningTimeout(RunningTimeoutTwoWaveMixin, unittest.TestCase):
    flags = (*SHIFT, "16")
    env = {"SGLANG_REQ_RUNNING_TIMEOUT": "5"}  # noqa: RUF012
    running_timeout_sleep = 2
