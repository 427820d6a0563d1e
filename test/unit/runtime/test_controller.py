"""The controller: which messages go to which ranks, over sockets of one process."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
import zmq
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.environ import envs
from sglang.srt.managers import io_struct
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import sock_recv, sock_send, wrap_as_pickle
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats, DPControllerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_shift.config import ShiftConfig
from sglang_shift.cost.layouts import InstanceCosts
from sglang_shift.cost.model import PHASES, CostModel, Curve
from sglang_shift.instances.messages import (
    ChangeLevelReq,
    InstancesReady,
    LevelChanged,
    LevelCosts,
    QueueLength,
    RequestsEnded,
    RequestsHeld,
    StepsMeasured,
)
from sglang_shift.modes import MODES
from sglang_shift.policy.instances import AutoPolicy
from sglang_shift.runtime import controller as module
from sglang_shift.runtime.controller import InstanceController, answer_type
from sglang_shift.runtime.instance_requests import ChangeInstancesReqInput, ChangeInstancesReqOutput, carry_messages

RANKS = 4
PROBE = f"{HEALTH_CHECK_RID_PREFIX}_1"
READY = InstancesReady({1: 100, 2: 200, 4: 400}, context=1000)


class Bench:
    """A controller between a tokenizer and ranks that the test plays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: str = "fixed") -> None:
        carry_messages()
        self.context = context = zmq.Context()

        def pair(name: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
            pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
            pull.bind(f"inproc://{name}")
            push.connect(f"inproc://{name}")
            pull.setsockopt(zmq.RCVTIMEO, 2000)
            return pull, push

        self.through = pair("through")

        def init(this: InstanceController, *_: object) -> None:
            this.health_round_robin_counter, this.refresh_load_budget_on_dispatch = 0, False
            self.tokenizer, this.to_tokenizer = pair("tokenizer")
            pairs = [pair(f"rank{rank}") for rank in range(RANKS)]
            self.ranks, this.workers = [pull for pull, _ in pairs], [push for _, push in pairs]
            this.init_dispatcher()

        config = ShiftConfig(RANKS, RANKS, switching=False, policy="tp", instances=RANKS, instance_policy=policy)
        monkeypatch.setattr(module, "shift_config_of", lambda _: config)
        monkeypatch.setattr(module, "resolution_result", lambda *_: None)
        monkeypatch.setattr(DataParallelController, "__init__", init)
        self.controller = InstanceController(None, None)

    def close(self) -> None:
        self.context.destroy(linger=0)

    def ask(self, message: object) -> None:
        """Send a message as the tokenizer does."""
        self.controller._request_dispatcher(self._as_it_arrives(message))

    def tell(self, message: object) -> None:
        """Send a message as a rank does."""
        self.controller._answer_dispatcher(self._as_it_arrives(wrap_as_pickle(message)))

    def answer(self, message: object) -> None:
        """Send an answer to a control request, as a rank does."""
        self.controller._answer_dispatcher(self._as_it_arrives(message))

    def _as_it_arrives(self, message: object) -> object:
        """The message after a socket. One that cannot be sent is found."""
        pull, push = self.through
        sock_send(push, message)
        return sock_recv(pull)

    def received(self) -> dict[int, list[object]]:
        """What each rank has got since the last call."""
        return {rank: got for rank, socket in enumerate(self.ranks) if (got := _all(socket))}

    def answers(self) -> list[object]:
        """What the tokenizer has got since the last call."""
        return _all(self.tokenizer)


def _all(socket: zmq.Socket[bytes]) -> list[object]:
    got = []
    while socket.poll(20):
        got.append(sock_recv(socket))
    return got


@pytest.fixture
def bench(monkeypatch):
    bench = Bench(monkeypatch)
    yield bench
    bench.close()


@pytest.fixture
def ready(bench):
    bench.tell(READY)
    return bench


@pytest.fixture
def paper(monkeypatch):
    """A controller with the rules of the paper, of which the ranks have said what they hold."""
    bench = Bench(monkeypatch, policy="paper")
    bench.tell(READY)
    yield bench
    bench.close()


def consult(bench: Bench) -> dict[int, list[object]]:
    """Let the controller ask its policy, as if nothing had changed lately. Returns what the ranks get."""
    bench.controller.policy_due, bench.controller.changed_at = 0.0, float("-inf")
    bench.controller.consult()
    return bench.received()


def request(
    rid: str, prompt: int = 10, output: int | None = 10, **fields: object
) -> io_struct.TokenizedGenerateReqInput:
    """A request of ``prompt`` tokens that asks for ``output`` tokens."""
    values: dict[str, object] = {
        "rid": rid, "input_text": "", "input_ids": array("q", range(prompt)), "input_embeds": None, "mm_inputs": None,
        "token_type_ids": None, "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0,
        "token_ids_logprob": None, "stream": False,
        "sampling_params": SamplingParams(max_new_tokens=output),
    }  # fmt: skip
    return io_struct.TokenizedGenerateReqInput(**values, **fields)


def changed(message: ChangeLevelReq, **fields: object) -> LevelChanged:
    """The report of ranks that have done what the controller asked for."""
    values = {"phases": {"exchange": 0.5}, "bytes_sent": 10, "tokens_recomputed": 1, "tokens_dropped": 0, "ok": True}
    return LevelChanged(message.epoch, message.first, message.ranks, message.level, **{**values, **fields})


def test_requests_go_to_different_instances(ready):
    for rid in "abcd":
        ready.ask(request(rid))
    got = ready.received()
    assert sorted(got) == [0, 1, 2, 3] and all(len(each) == 1 for each in got.values())
    ready.tell(RequestsEnded([got[2][0].rid]))
    ready.ask(request("e"))
    assert list(ready.received()) == [2]


def test_requests_wait_until_the_ranks_have_said_what_they_hold(bench):
    bench.ask(request("early"))
    assert not bench.received()
    bench.tell(READY)
    assert [each.rid for [each] in bench.received().values()] == ["early"]


def test_a_request_that_no_instance_holds_gets_an_error_that_says_what_to_do(ready):
    ready.ask(request("long", prompt=120, output=30, http_worker_ipc="worker"))
    [answer] = ready.answers()
    assert answer.rid == "long" and answer.http_worker_ipc == "worker"
    message = answer.finished_reason["message"]
    assert "needs 152 tokens" in message and "holds 100" in message and "merge to 2 ranks" in message
    assert not ready.received() and not ready.controller.ledger.requests


def test_a_request_without_a_limit_gets_what_its_instance_has_room_for(ready):
    ready.ask(request("endless", prompt=60, output=None))
    ready.ask(request("beyond all ranks", prompt=60, output=5000))
    assert sorted(ready.received()) == [0, 1]


def test_a_request_that_pages_make_too_large_goes_to_a_larger_instance(bench):
    """The ranks would accept the prompt on an instance of 1008 tokens, and let it wait for ever."""
    bench.tell(InstancesReady({1: 1008, 2: 2016, 4: 4032}, context=8192, page_size=16))
    bench.ask(request("refused", prompt=995, output=4))
    [answer] = bench.answers()
    message = answer.finished_reason["message"]
    assert "needs 1029 tokens" in message and "holds 1008" in message and "merge to 2 ranks" in message
    bench.ask(ChangeInstancesReqInput(level=2, first=2, ranks=2))
    bench.tell(changed(bench.received()[2][0]))
    for rid, prompt, output in (("beside", 995, 4), ("endless", 995, None), ("in pages", 990, 2), ("near", 961, 16)):
        bench.ask(request(rid, prompt=prompt, output=output))
    assert {rank: [each.rid for each in got] for rank, got in bench.received().items()} == {
        2: ["beside", "endless", "in pages", "near"]
    }
    bench.ask(request("whole", prompt=961, output=15))
    assert list(bench.received()) in ([0], [1])


def test_merge_by_hand(ready):
    for rid in "abcd":
        ready.ask(request(rid))
    ready.received()
    ready.ask(ChangeInstancesReqInput(level=2, first=2, ranks=2, http_worker_ipc="worker"))
    got = ready.received()
    assert sorted(got) == [2, 3] and got[2] == got[3]
    [message] = got[2]
    assert (message.first, message.ranks, message.level) == (2, 2, 2)

    # Nothing goes to ranks that change, and what only they could take is held. So is an abort, for these ranks.
    ready.ask(request("e"))
    ready.ask(request("long", prompt=120))
    ready.ask(io_struct.AbortReq(rid="a"))
    assert [[each.rid for each in got] for got in ready.received().values()] == [["e", "a"], ["a"]]
    assert not ready.answers()

    ready.tell(changed(message))
    [answer] = ready.answers()
    assert isinstance(answer, ChangeInstancesReqOutput) and answer.success and answer.http_worker_ipc == "worker"
    assert [(each["first"], each["level"]) for each in answer.report["instances"]] == [(0, 1), (1, 1), (2, 2)]
    assert answer.report["changes"][0]["phases"] == {"exchange": 0.5}
    got = ready.received()
    assert [each.rid for each in got[2]] == ["a", "long"] and sorted(got) == [2], "3 follows and gets nothing"


def test_several_changes_run_one_after_the_other(ready):
    ready.ask(ChangeInstancesReqInput(level=2))
    assert sorted(ready.received()) == [0, 1]
    ready.tell(changed(ChangeLevelReq(1, 0, 2, 2, "")))
    assert sorted(ready.received()) == [2, 3] and not ready.answers()
    ready.tell(changed(ChangeLevelReq(2, 2, 2, 2, "")))
    [answer] = ready.answers()
    assert len(answer.report["changes"]) == 2 and ready.controller.ledger.leaders == [0, 2]

    ready.ask(ChangeInstancesReqInput(level=1, first=2, ranks=2))
    got = ready.received()
    assert list(got) == [2], "a follower gets it from its leader"
    ready.tell(changed(got[2][0]))
    ready.tell(RequestsHeld(3, []))
    assert ready.controller.ledger.leaders == [0, 2, 3]


def test_a_change_that_ranks_give_up(ready):
    ready.ask(ChangeInstancesReqInput(level=4))
    [message] = ready.received()[0]
    ready.ask(request("held"))
    ready.tell(changed(message, ok=False, reason="there is no memory"))
    [answer] = ready.answers()
    assert not answer.success and answer.message == "there is no memory"
    assert ready.controller.ledger.leaders == [0, 1, 2, 3]
    assert sum(map(len, ready.received().values())) == 1, "the request that was held is served"


def test_health_checks_go_to_the_leaders_in_turn_and_count_for_nobody(ready):
    """A busy rank answers a health check without its id, so nobody would take it out of the ledger again."""
    for _ in range(RANKS):
        ready.ask(request(PROBE))
    assert sorted(ready.received()) == [0, 1, 2, 3]
    ready.ask(ChangeInstancesReqInput(level=2, first=0, ranks=2))
    [message] = ready.received()[0]
    for _ in range(3):
        ready.ask(request(PROBE))
    assert not ready.received() and not ready.controller.deployment().unplaced
    ready.tell(changed(message))
    assert sorted(ready.received()) == [0, 2, 3]
    assert not ready.controller.ledger.requests


@pytest.mark.parametrize("pickled", [True, False])
def test_a_request_that_was_held_can_be_sent(ready, monkeypatch, pickled):
    """SGLang sends messages as pickles, or by msgpack with the times of a request as a pickle inside."""
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", pickled)
    ready.ask(ChangeInstancesReqInput(level=4))
    [message] = ready.received()[0]
    for rid in ("held", PROBE):
        ready.ask(request(rid, time_stats=wrap_as_pickle(APIServerReqTimeStats())))
    ready.tell(changed(message))
    got = ready.received()[0]
    assert [each.rid for each in got] == ["held", PROBE]
    for each in got:
        each.unwrap_pickle_fields()
        assert isinstance(each.time_stats, DPControllerReqTimeStats)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"level": 3}, "level 3 is not one of the levels"),
        ({"level": 2, "first": 1, "ranks": 2}, "do not form instances"),
    ],
)
def test_a_change_that_is_not_possible(ready, wanted, why):
    ready.ask(ChangeInstancesReqInput(**wanted))
    [answer] = ready.answers()
    assert not answer.success and why in answer.message and not ready.received()


def test_no_change_beside_another_or_while_generation_is_paused(ready):
    ready.ask(ChangeInstancesReqInput(level=2, first=0, ranks=2))
    message = ready.received()[0][0]
    ready.ask(ChangeInstancesReqInput(level=2, first=2, ranks=2))
    assert "merge or split already" in ready.answers()[0].message
    ready.tell(changed(message))
    ready.answers()
    ready.ask(io_struct.PauseGenerationReqInput(mode="retract"))
    assert sorted(ready.received()) == [0, 2, 3]
    ready.ask(ChangeInstancesReqInput(level=1, first=0, ranks=2))
    assert "paused" in ready.answers()[0].message
    ready.ask(io_struct.ContinueGenerationReqInput())
    ready.received()
    ready.ask(ChangeInstancesReqInput(level=1, first=0, ranks=2))
    assert list(ready.received()) == [0]


def test_an_answer_is_a_failure_if_one_leader_fails(ready):
    ready.ask(io_struct.FlushCacheReqInput())
    assert sorted(ready.received()) == [0, 1, 2, 3]
    for success in (True, False, True):
        ready.answer(io_struct.FlushCacheReqOutput(success=success))
    assert not ready.answers()
    ready.ask(ChangeInstancesReqInput(level=4))
    assert "FlushCache" in ready.answers()[0].message, "no change while an answer is missing"
    ready.answer(io_struct.FlushCacheReqOutput(success=True))
    [answer] = ready.answers()
    assert answer.success is False


def test_answers_of_two_tokenizer_workers_are_not_mixed(ready):
    for worker in ("a", "b"):
        ready.ask(io_struct.FlushCacheReqInput(http_worker_ipc=worker))
    for worker in ("a", "b", "b", "a", "b", "b"):
        ready.answer(io_struct.FlushCacheReqOutput(success=True, http_worker_ipc=worker))
    assert [each.http_worker_ipc for each in ready.answers()] == ["b"]


def test_the_first_instance_answers_reads_for_all(ready):
    ready.ask(io_struct.GetInternalStateReq())
    assert list(ready.received()) == [0]
    ready.answer(io_struct.GetInternalStateReqOutput(internal_state={"shift": {"policy": "tp"}}))
    [answer] = ready.answers()
    assert len(answer.internal_state["shift"]["instances"]["instances"]) == 4


def test_weights_change_only_when_all_ranks_are_one_instance(ready):
    update = io_struct.UpdateWeightFromDiskReqInput(model_path="/model")
    ready.ask(update)
    [answer] = ready.answers()
    assert not answer.success and "needs all 4 ranks as one instance" in answer.message and not ready.received()
    ready.ask(ChangeInstancesReqInput(level=4))
    ready.tell(changed(ready.received()[0][0]))
    ready.answers()
    ready.ask(update)
    assert list(ready.received()) == [0]


def update(bench: Bench, asked: object, success: bool = True) -> None:
    """Send a request of a weight update, and the answer of the one leader."""
    bench.ask(asked)
    assert list(bench.received()) == [0]
    bench.answer(answer_type(type(asked))(success=success, message=""))
    assert [each.success for each in bench.answers()] == [success]


def test_no_change_in_the_middle_of_a_weight_update(ready):
    ready.ask(ChangeInstancesReqInput(level=4))
    ready.tell(changed(ready.received()[0][0]))
    ready.answers()
    update(ready, io_struct.BeginWeightUpdateReqInput(), success=False)
    assert not ready.controller.why_not_now()
    update(ready, io_struct.BeginWeightUpdateReqInput())
    buckets = {"names": [], "dtypes": [], "shapes": []}
    for asked, success in (
        (io_struct.UpdateWeightsFromDistributedReqInput(**buckets), True),
        (io_struct.UpdateWeightsFromDistributedReqInput(**buckets), False),
        (io_struct.BeginWeightUpdateReqInput(), False),  # it is open already
    ):
        update(ready, asked, success)
        ready.ask(ChangeInstancesReqInput(level=1))
        [answer] = ready.answers()
        assert not answer.success and "a weight update is open; end it" in answer.message and not ready.received()
    update(ready, io_struct.EndWeightUpdateReqInput())
    ready.ask(ChangeInstancesReqInput(level=1))
    assert isinstance(ready.received()[0][0], ChangeLevelReq)


GROUP = {"master_address": "", "master_port": 1, "rank_offset": 1, "world_size": 5}


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (io_struct.BeginWeightUpdateReqInput(), io_struct.EndWeightUpdateReqInput()),
        (io_struct.InitWeightsUpdateGroupReqInput(**GROUP), io_struct.DestroyWeightsUpdateGroupReqInput()),
    ],
    ids=["update", "group"],
)
def test_a_policy_does_not_split_between_the_requests_of_a_weight_update(paper, begin, end):
    """The rules of the paper split idle instances."""
    paper.ask(ChangeInstancesReqInput(level=4))
    paper.tell(changed(paper.received()[0][0]))
    paper.answers()
    update(paper, begin)
    assert not consult(paper)
    update(paper, end)
    assert [each.level for each in consult(paper)[0]] == [1]


def test_an_operator_may_split_while_a_trainer_is_connected_and_the_policy_may_merge_then(paper):
    def change(level: int) -> None:
        paper.ask(ChangeInstancesReqInput(level=level))
        paper.tell(changed(paper.received()[0][0]))
        [answer] = paper.answers()
        assert answer.success

    change(4)
    update(paper, io_struct.InitWeightsUpdateGroupReqInput(**GROUP))
    change(1)
    paper.ask(request("long", prompt=120))
    assert [each.level for each in consult(paper)[0]] == [2], "else the request would wait for ever"


def test_sessions_are_refused(ready):
    ready.ask(io_struct.OpenSessionReqInput(capacity_of_str_len=10, session_id="s"))
    [answer] = ready.answers()
    assert answer.session_id == "s" and not answer.success
    ready.ask(request("r", session_params=io_struct.SessionParams(id="s")))
    [answer] = ready.answers()
    assert "session" in answer.finished_reason["message"] and not ready.received()


def test_aborts_reach_all_leaders_and_what_is_held(ready):
    ready.ask(io_struct.AbortReq(rid="x"))
    assert sorted(ready.received()) == [0, 1, 2, 3]
    ready.ask(ChangeInstancesReqInput(level=4))
    ready.received()
    ready.ask(request("held-1"))
    ready.ask(request("other"))
    ready.ask(io_struct.AbortReq(rid="held"))
    [answer] = ready.answers()
    assert answer.rid == "held-1" and answer.finished_reason["type"] == "abort"
    assert answer.finished_reason["status_code"] is None, "as if it waited on a rank, the answer is no error"
    why = {"type": "abort", "message": "a reason of the sender"}
    ready.ask(io_struct.AbortReq(abort_all=True, finished_reason=why))
    assert [(each.rid, each.finished_reason) for each in ready.answers()] == [("other", why)]


def test_an_abort_during_a_change_spares_a_later_request_of_the_same_id(ready):
    """The request ends before the change, and another instance gets a new one with its id."""
    for rid in "abc":
        ready.ask(request(rid))
    ready.ask(ChangeInstancesReqInput(level=2))
    message = ready.received()[0][-1]
    ready.ask(io_struct.AbortReq(rid="a"))
    assert sorted(ready.received()) == [2, 3], "instances that do not change get the abort at once"
    ready.tell(RequestsEnded(["a"]))
    ready.ask(request("a"))
    assert [each.rid for each in ready.received()[3]] == ["a"]
    ready.tell(changed(message))
    got = ready.received()
    assert sorted(got) == [0, 2, 3]
    assert [type(each) for each in got[0]] == [io_struct.AbortReq], "before what follows"
    assert [type(each) for each in got[3]] == [ChangeLevelReq], "the new request is not aborted"


def test_an_abort_reaches_ranks_that_gave_a_change_up(ready):
    ready.ask(request("a"))
    ready.ask(ChangeInstancesReqInput(level=2, first=0, ranks=2))
    message = ready.received()[0][-1]
    ready.ask(io_struct.AbortReq(rid="a"))
    ready.received()
    ready.tell(changed(message, ok=False, reason="there is no memory"))
    assert sorted(ready.received()) == [0, 1]


def test_the_answer_says_what_was_done_if_a_later_change_is_given_up(ready):
    ready.ask(ChangeInstancesReqInput(level=2))
    ready.tell(changed(ready.received()[0][0]))
    ready.tell(changed(ready.received()[2][0], ok=False, reason="there is no memory"))
    [answer] = ready.answers()
    assert not answer.success
    assert answer.message.startswith("there is no memory; 1 of the 2 changes that this takes were made before")
    assert "the instances now have 2, 1, 1 ranks" in answer.message
    assert [each["level"] for each in answer.report["instances"]] == [2, 1, 1]
    assert [each["ok"] for each in answer.report["changes"]] == [True, False]


def test_a_shutdown_ends_the_loop_after_the_ranks_know(ready):
    ready.ask(io_struct.ShutdownReq())
    assert sorted(ready.received()) == [0, 1, 2, 3] and ready.controller.ended


def test_the_rules_of_the_paper_merge_for_a_request_and_split_after_it(monkeypatch):
    bench = Bench(monkeypatch, policy="paper")
    controller = bench.controller
    bench.tell(READY)
    bench.ask(request("short"))
    assert list(bench.received()) == [0]
    bench.ask(request("long", prompt=120))
    assert not bench.answers() and not bench.received()
    controller.consult()
    got = bench.received()
    [message] = got[2]
    assert sorted(got) == [2, 3] and message.level == 2 and message.reason == "the policy paper", "the idle ranks merge"
    bench.tell(changed(message))
    assert [each.rid for each in bench.received()[2]] == ["long"]

    controller.policy_due, controller.changed_at = 0.0, float("-inf")
    controller.consult()
    assert not bench.received(), "a live request needs the level"
    bench.tell(RequestsEnded(["long"]))
    controller.policy_due = 0.0
    controller.consult()
    assert [each.level for each in bench.received()[2]] == [1]
    bench.close()


def test_a_request_that_no_merge_helps_waits_no_longer_than_on_a_rank(paper, monkeypatch):
    """The ranks give each merge up, as long as a request lives that cannot travel."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    paper.ask(request("long", prompt=120, http_worker_ipc="worker"))
    with envs.SGLANG_REQ_WAITING_TIMEOUT.override(60):
        for _ in range(7):
            if got := consult(paper):
                message = next(iter(got.values()))[0]
                paper.tell(changed(message, ok=False, reason="request a has its own embeddings"))
            assert paper.controller.held_since == {"long": 100.0}, "also after each attempt"
            now[0] += 8.5
            paper.controller.end_late()
            assert not paper.answers()
        now[0] += 1.0
        paper.controller.end_late()
    [answer] = paper.answers()
    assert (answer.rid, answer.http_worker_ipc) == ("long", "worker")
    reason = answer.finished_reason
    assert (reason["message"], reason["status_code"]) == ("Request waiting timeout reached.", 503)
    assert not paper.controller.held and not paper.controller.held_since
    assert not paper.controller.deployment().unplaced, "no merge is tried for it any more"


def test_a_held_request_may_wait_for_ever_if_it_may_on_a_rank(paper, monkeypatch):
    paper.ask(request("long", prompt=120))
    paper.controller.held_since["long"] = float("-inf")
    paper.controller.end_late()
    assert not paper.answers() and len(paper.controller.held) == 1


def test_as_many_requests_are_held_as_may_wait_on_a_rank(paper):
    paper.controller.most_held = 2
    for rid in "abc":
        paper.ask(request(rid, prompt=120))
    [answer] = paper.answers()
    reason = answer.finished_reason
    assert (answer.rid, reason["message"], reason["status_code"]) == ("c", "The request queue is full.", 503)
    paper.controller.release()
    assert [each.rid for each in paper.controller.held] == ["a", "b"] and not paper.answers()
    paper.ask(io_struct.AbortReq(rid="a"))
    assert set(paper.controller.held_since) == {"b"}
    paper.received()
    [message] = consult(paper)[0]
    paper.tell(changed(message))
    assert [each.rid for each in paper.received()[0] if isinstance(each, io_struct.TokenizedGenerateReqInput)] == ["b"]
    assert not paper.controller.held_since


def test_a_split_that_ranks_give_up_is_tried_again_later_and_later(monkeypatch):
    """A request that the controller sees as short may need the whole instance, because it asked for no limit."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    bench = Bench(monkeypatch, policy="paper")
    bench.tell(READY)
    bench.ask(request("long", prompt=120))
    bench.controller.consult()
    bench.tell(changed(bench.received()[0][0]))
    bench.tell(RequestsEnded(["long"]))
    bench.received()
    tries = []
    for _ in range(1000):
        now[0] += 0.1
        bench.controller.consult()
        if bench.controller.operation is not None:
            tries.append(now[0])
            message = ChangeLevelReq(bench.controller.epoch, 0, 2, 1, "")
            bench.tell(changed(message, ok=False, reason="request long may need 130 tokens"))
    gaps = [round(later - earlier) for earlier, later in pairwise(tries)]
    assert gaps == [4, 8, 16, 32]
    bench.close()


def test_a_split_that_ranks_give_up_keeps_no_other_instance_from_splitting(paper):
    paper.ask(ChangeInstancesReqInput(level=2))
    paper.tell(changed(paper.received()[0][0]))
    paper.tell(changed(paper.received()[2][0]))
    paper.tell(changed(consult(paper)[0][0], ok=False, reason="request a has its own embeddings"))
    got = consult(paper)
    assert list(got) == [2]
    paper.tell(changed(got[2][0]))
    assert paper.controller.ledger.leaders == [0, 2, 3]


def costs(ranks: int, start: float, slope: float) -> InstanceCosts:
    """A decode step takes ``start`` seconds, and ``slope`` more for each token. Prompts take hardly any time."""
    decode, prefill = Curve((1, 1000), (start, start + 1000 * slope)), Curve((1,), (1e-4,))
    curves = {phase: dict.fromkeys(MODES, decode if phase == "decode" else prefill) for phase in PHASES}
    model = CostModel(curves, dict.fromkeys(PHASES, Curve((1,), (1.0,))), dict.fromkeys(PHASES, 0.0), 0.0)
    return InstanceCosts(ranks, model, 100 * ranks)


LEVELS = {1: costs(1, 0.04, 0.001), 2: costs(2, 0.04, 0.02), 4: costs(4, 0.01, 0.02)}
"""All ranks together are faster for a request alone, and slower for many."""


@pytest.fixture
def auto(monkeypatch):
    """A controller with the policy auto, and a clock that the test sets."""
    bench = Bench(monkeypatch, policy="auto")
    bench.now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: bench.now)
    changes = {(a, b): 0.05 for a in LEVELS for b in LEVELS if a != b}
    bench.tell(InstancesReady(READY.capacities, READY.context, LevelCosts(LEVELS, changes)))
    yield bench
    bench.close()


def test_auto_gets_the_tables_of_the_ranks(auto):
    policy = auto.controller.policy
    assert isinstance(policy, AutoPolicy) and policy.dwell == 2.0
    assert {k: level.costs for k, level in policy.levels.items()} == {k: level.costs for k, level in LEVELS.items()}
    assert auto.controller.report()["policy"]["name"] == "auto"


def test_auto_decides_by_the_times_that_an_instance_has_measured_again(auto):
    """One request alone was faster on all ranks. Now it is slower there, so they do not merge."""
    auto.tell(StepsMeasured(costs(4, 0.08, 0.02)))
    policy = auto.controller.policy
    assert policy.levels[4].step_seconds(1, 0, 0) == pytest.approx(0.08, rel=0.3)
    assert [policy.levels[k].costs for k in (1, 2)] == [LEVELS[k].costs for k in (1, 2)], "others stay"
    auto.ask(request("a"))
    auto.received()
    auto.now += 16.0
    auto.controller.consult()
    assert auto.received() == {}
    predictions = auto.controller.report()["policy"]["predictions"]
    assert predictions["4"]["seconds"] > predictions["1+1+1+1"]["seconds"]


def test_another_policy_needs_no_times(paper):
    paper.tell(StepsMeasured(costs(4, 0.08, 0.02)))
    assert paper.received() == {}


def test_auto_merges_when_requests_are_few_and_splits_when_they_are_many(auto):
    controller = auto.controller

    def wait(seconds: float) -> dict[int, list[object]]:
        auto.now += seconds
        controller.consult()
        return auto.received()

    auto.ask(request("a"))
    assert list(auto.received()) == [0] and not wait(1.0), "it watches before it decides"
    [message] = wait(15.0)[0]
    assert (message.level, message.limits) == (4, ()) and message.reason.startswith("the policy auto: 4 takes ")
    assert "; 1+1+1+1 takes" in message.reason
    predictions = controller.report()["policy"]["predictions"]
    assert predictions["4"]["seconds"] < predictions["1+1+1+1"]["seconds"]
    auto.tell(changed(message))

    for number in range(200):
        auto.ask(request(f"b{number}"))
    auto.tell(QueueLength(0, 190))
    assert controller.deployment().instances[0].waiting == 190
    auto.received()
    assert not wait(0.5), "changes have a least distance"
    [message] = wait(15.0)[0]
    assert message.level == 1 and message.limits == (100, 100, 100, 100)
    auto.tell(changed(message))
    assert not any(state.waiting for state in controller.deployment().instances), "the leaders report again"


def test_a_part_that_splits_further_gets_the_limit_of_its_instances(auto, monkeypatch):
    controller = auto.controller
    auto.ask(ChangeInstancesReqInput(level=4))
    auto.tell(changed(auto.received()[0][0]))
    monkeypatch.setattr(controller.policy, "wanted", lambda deployment: (2, 1, 1))
    controller.consult()
    [message] = auto.received()[0]
    assert (message.level, message.limits) == (2, (200, 100))
    monkeypatch.setattr(controller.policy, "wanted", lambda deployment: deployment.layout)
    auto.tell(changed(message))
    [message] = auto.received()[2]
    assert (message.first, message.level, message.limits) == (2, 1, (100, 100))


def test_auto_learns_how_much_requests_generate(auto):
    policy = auto.controller.policy
    auto.ask(request("a", output=40))
    auto.tell(RequestsEnded(["a"], [10]))
    auto.ask(request("b", output=40))
    [found] = policy.demand.classes(auto.now)
    assert found.output == pytest.approx((40 + 10) / 2)
    assert found.need == 52, "an instance must have room for all that a request may generate"


def test_auto_merges_at_once_for_a_request_that_fits_nowhere(auto):
    auto.ask(request("long", prompt=150))
    assert not auto.received()
    auto.controller.consult()
    got = auto.received()
    assert sorted(got) == [0, 1] and got[0][0].level == 2 and "needs 162 tokens" in got[0][0].reason
    auto.tell(changed(got[0][0]))
    assert [each.rid for each in auto.received()[0]] == ["long"]
    assert auto.controller.policy.change_seconds == pytest.approx((0.05 + 0.5) / 2), "the measured time counts"
