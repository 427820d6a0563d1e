"""The controller of instances: it sends each request to an instance, and lets instances merge and split.

It stands between the tokenizer and the ranks, as SGLang's controller of replicas does. All ranks are one world, so they
are started as the ranks of one server, and each has an input socket of its own. Answers to control requests come back
to the controller, which waits for all leaders and sends one answer to the tokenizer.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from http import HTTPStatus
from typing import Any

import psutil
import setproctitle
import zmq
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.environ import envs
from sglang.srt.managers import io_struct
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import PickleWrapper, sock_recv, sock_send, wrap_as_pickle
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish
from sglang.srt.utils.common import configure_logger
from sglang.srt.utils.network import get_zmq_socket
from sglang.utils import TypeBasedDispatcher

from sglang_shift.cost.deployment import Deployment, InstancePolicy
from sglang_shift.cost.layouts import Layout
from sglang_shift.instances.back_off import BackOff
from sglang_shift.instances.changes import Change, check_range, largest_targets, plan, plan_layout
from sglang_shift.instances.feed import PolicyFeed
from sglang_shift.instances.ledger import Ledger
from sglang_shift.instances.levels import Levels
from sglang_shift.instances.messages import (
    ChangeLevelReq,
    InstancesReady,
    LevelChanged,
    QueueLength,
    RequestsEnded,
    RequestsHeld,
    StepsMeasured,
)
from sglang_shift.instances.room import RoomRule
from sglang_shift.observe.events import InstancesEvent, Publisher
from sglang_shift.policy.instances import AutoPolicy, PaperPolicy
from sglang_shift.resolution import shift_config_of
from sglang_shift.runtime.instance_channels import answers_of, input_of
from sglang_shift.runtime.instance_requests import (
    ChangeInstancesReqInput,
    ChangeInstancesReqOutput,
    carry_messages,
)
from sglang_shift.runtime.process_watch import end_with_parent
from sglang_shift.runtime.reporter import STATE_S
from sglang_shift.runtime.weight_updates import UPDATING, WeightUpdates
from sglang_shift.seams import overrides, relies_on

logger = logging.getLogger(__name__)

POLL_MS = 100
"""The longest wait for a message, in milliseconds. After it, the watchdog is fed."""

POLICY_S = 0.1
"""The least seconds between two questions to the policy."""

LAST_CHANGES = 20
"""Changes that the report names."""

REQUESTS = (io_struct.TokenizedGenerateReqInput, io_struct.TokenizedEmbeddingReqInput)

WHOLE_WORLD = (
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.InitWeightsUpdateGroupReqInput,
    io_struct.DestroyWeightsUpdateGroupReqInput,
    io_struct.BeginWeightUpdateReqInput,
    io_struct.EndWeightUpdateReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.UpdateWeightsFromTensorReqInput,
    io_struct.UpdateWeightsFromIPCReqInput,
    io_struct.InitWeightsSendGroupForRemoteInstanceReqInput,
    io_struct.SendWeightsToRemoteInstanceReqInput,
    io_struct.CheckWeightsReqInput,
    io_struct.ProfileReq,
)
"""Requests that are only right if all ranks are one instance: the shards of weights, and files named by TP ranks."""

READS = (
    io_struct.GetInternalStateReq,
    io_struct.GetHiCacheL3LayoutReq,
    io_struct.GetWeightsByNameReqInput,
)
"""Requests that the first instance answers for all."""

MERGE_FIRST = (
    "this needs all {ranks} ranks as one instance; merge them first (POST /shift/instances with level {ranks}), then "
    "try again"
)
NO_SESSIONS = "instances cannot keep a session, because its requests must stay on one instance; send whole prompts"
TOO_LONG = (
    "the request needs {need} tokens of KV cache, and the largest instance holds {largest}; ask for fewer tokens, or "
    "let instances merge to {level} ranks (POST /shift/instances)"
)
FULL = "The request queue is full."
"""SGLang's words for a request beyond ``--max-queued-requests``."""

LATE = "Request waiting timeout reached."
"""SGLang's words for a request that has waited for longer than ``SGLANG_REQ_WAITING_TIMEOUT``."""

ABORTED = "the request was aborted before an instance had it"
BUSY = "instances merge or split already; try again when they are done"
ANSWERING = "the ranks still work on a {kind}; try again when it is answered"
HALFWAY = (
    "{problem}; {made} of the {count} changes that this takes were made before, so the instances now have {levels} "
    "ranks; ask for the level again, or for the one before"
)
PAUSED = "generation is paused; continue it (/continue_generation) before instances merge or split"


@dataclass
class Gathering:
    """The answers of the leaders to one control request.

    Attributes:
        request: The request.
        kind: The type of the answers.
        worker: The address of the tokenizer worker that has sent the request; None if there is one tokenizer.
        count: How many leaders will answer.
        answers: The answers so far.
    """

    request: Any
    kind: type
    worker: str | None
    count: int
    answers: list[Any] = field(default_factory=list)

    def combined(self) -> Any:
        """One answer: a failure, if there is one, and else the first answer."""
        failures = [each for each in self.answers if not getattr(each, "success", True)]
        failures += [each for each in self.answers if not getattr(each, "updated", True)]
        return (failures or self.answers)[0]


@dataclass
class Operation:
    """What an operator or a policy asked for, and how far it is.

    Attributes:
        changes: The changes that are still to make.
        reason: Why.
        wanted: The level of each instance afterwards, in the order of their ranks; empty if an operator asked.
        request: The operator's request; None if a policy asked.
        done: The reports of the ranks so far.
    """

    changes: deque[Change]
    reason: str
    wanted: Layout = ()
    request: ChangeInstancesReqInput | None = None
    done: list[LevelChanged] = field(default_factory=list)


class InstanceController(DataParallelController):
    """SGLang's controller of replicas, for instances of one world."""

    @overrides("Our controller knows the instances, and starts no processes.")
    @relies_on(
        "sglang.srt.managers.data_parallel_controller:DataParallelController.dispatching_with_trace",
        "This method calls dispatching or dispatch_health_check.",
    )
    def __init__(self, server_args: Any, port_args: Any) -> None:
        config = shift_config_of(server_args)
        assert config is not None
        self.world_size = config.world_size
        self.ledger = Ledger.at(Levels.of_flags(config.world_size, config.instances, config.merge_levels))
        self.policy: InstancePolicy = InstancePolicy()
        self.policy_name = config.instance_policy
        self.feed = PolicyFeed()
        self.room = RoomRule(page_size=1, context=0)
        self.held: deque[Any] = deque()
        self.held_since: dict[str, float] = {}
        self.most_held: int | None = resolution_result(server_args, "max_queued_requests")
        self.aborts: list[Any] = []
        self.gatherings: list[Gathering] = []
        self.updates = WeightUpdates()
        self.operation: Operation | None = None
        self.change: Change | None = None
        self.changed_at = float("-inf")
        self.back_off = BackOff()
        self.last: deque[dict[str, Any]] = deque(maxlen=LAST_CHANGES)
        self.epoch = 0
        self.paused = False
        self.ended = False
        self.publisher = Publisher(config.world_size)
        self.event_due = self.policy_due = 0.0
        super().__init__(server_args, port_args, _starts_nothing)
        self.dispatching = self.arrive

    @overrides("Our method opens the sockets of the ranks. The launcher has started the ranks already.")
    def launch_dp_schedulers(self, server_args: Any, port_args: Any) -> None:
        ranks = range(self.world_size)
        self.workers = [get_zmq_socket(self.context, zmq.PUSH, input_of(port_args, rank), True) for rank in ranks]
        self.from_ranks = get_zmq_socket(self.context, zmq.PULL, answers_of(port_args), True)
        self.to_tokenizer = get_zmq_socket(self.context, zmq.PUSH, port_args.tokenizer_ipc_name, False)

    @overrides("Our method says which messages go to which instances.")
    def init_dispatcher(self) -> None:
        self._request_dispatcher = TypeBasedDispatcher(
            [
                (io_struct.TokenizedGenerateReqInput, self.dispatching_with_trace),
                (io_struct.TokenizedEmbeddingReqInput, self.dispatching_with_trace),
                (io_struct.BatchTokenizedGenerateReqInput, self.dispatch_batch_generate),
                (io_struct.BatchTokenizedEmbeddingReqInput, self.dispatch_batch_embedding),
                (io_struct.AbortReq, self.abort),
                (io_struct.OpenSessionReqInput, self.refuse_session),
                (ChangeInstancesReqInput, self.operate),
            ]
        )
        self._request_dispatcher.add_fallback_fn(self.control)
        self._answer_dispatcher = TypeBasedDispatcher(
            [
                (InstancesReady, self.take_capacities),
                (RequestsEnded, self.take_ends),
                (QueueLength, lambda message: self.feed.waiting.update({message.first: message.waiting})),
                (RequestsHeld, lambda message: self.ledger.held_by(message.first, message.rids)),
                (StepsMeasured, lambda message: self.policy.measured(message.costs)),
                (LevelChanged, self.take_change),
            ]
        )
        self._answer_dispatcher.add_fallback_fn(self.take_answer)

    @overrides("Our loop also reads what the ranks send, and waits for messages without using the CPU.")
    def event_loop(self) -> None:
        """Handle messages until the server is stopped."""
        poller = zmq.Poller()
        handlers: dict[Any, Callable[[Any], Any]] = {
            self.from_ranks: self._answer_dispatcher,
            self.recv_from_tokenizer: self._request_dispatcher,
        }
        for socket in handlers:
            poller.register(socket, zmq.POLLIN)
        while not self.ended:
            self.soft_watchdog.feed()
            ready = dict(poller.poll(POLL_MS))
            for socket, handle in handlers.items():
                if socket in ready:
                    handle(sock_recv(socket))
            self.end_late()
            if time.monotonic() >= self.event_due:
                self.publish()
            if self.policy.changes_layout:
                self.consult()

    # --- requests -----------------------------------------------------------------------------------------------------

    def arrive(self, req: Any) -> None:
        """Take a new request, and tell the policy of it."""
        if self.ledger.capacities:
            self._tell_policy(req)
        self.route(req)

    def _tell_policy(self, req: Any) -> None:
        prompt, need = prompt_tokens(req), self.need(req)
        output = getattr(req.sampling_params, "max_new_tokens", None)
        most = max(1, min(self.room.context, max(self.ledger.capacities.values())) - prompt)
        allowed = most if output is None else min(output, most)
        self.feed.arrived(self.policy, time.monotonic(), req.rid, prompt, allowed, need)

    def route(self, req: Any) -> None:
        """Send a request to an instance, hold it while ranks change, or answer it with an error."""
        if getattr(req, "session_params", None) is not None:
            self.refuse(req, NO_SESSIONS)
            return
        if not self.ledger.capacities:
            self.hold(req)
            return
        need = self.need(req)
        index = self.policy.route(self.deployment(), need)
        if index is not None:
            instance = self.ledger.layout[index]
            self.ledger.place(req.rid, instance, need)
            self.held_since.pop(req.rid, None)
            if not isinstance(req.time_stats, PickleWrapper):
                req.time_stats = wrap_as_pickle(req.time_stats)  # SGLang leaves it open in a request that was held
            sock_send(self.workers[instance.leader], req)
        elif self.operation is not None or self.policy.changes_layout:
            self.hold(req)
        else:
            level = self.ledger.level_for(need)
            self.refuse(req, TOO_LONG.format(need=need, largest=self.ledger.largest, level=level))

    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler._abort_on_queued_limit",
        "With --max-queued-requests, this method aborts a request that would make the queue of a rank longer.",
    )
    def hold(self, req: Any) -> None:
        """Let a request wait here for an instance, unless as many wait here as may wait on a rank."""
        if self.most_held is not None and sum(map(_is_served, self.held)) >= self.most_held:
            self.refuse(req, FULL, HTTPStatus.SERVICE_UNAVAILABLE)
            return
        self.held.append(req)
        self.held_since.setdefault(req.rid, time.monotonic())

    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler._poll_timeout_aborts",
        "With SGLANG_REQ_WAITING_TIMEOUT, this method aborts requests that have waited on a rank for longer.",
    )
    def end_late(self) -> None:
        """Answer held requests with an error if they have waited for longer than they may wait on a rank."""
        timeout, now = envs.SGLANG_REQ_WAITING_TIMEOUT.get(), time.monotonic()
        if timeout <= 0:
            return
        late = {rid for rid, since in self.held_since.items() if timeout < now - since}
        if not late:
            return
        held, self.held = self.held, deque()
        for each in held:
            if _is_served(each) and each.rid in late:
                self.refuse(each, LATE, HTTPStatus.SERVICE_UNAVAILABLE)
            else:
                self.held.append(each)

    def need(self, req: Any) -> int:
        """The tokens that the KV cache of an instance must have for a request.

        What no instance could hold goes to one that all ranks form. Its ranks answer that it is too long.
        """
        largest = max(self.ledger.capacities.values())
        output = getattr(req.sampling_params, "max_new_tokens", None)
        return min(self.room.need(prompt_tokens(req), output, largest), largest)

    def deployment(self) -> Deployment:
        """The instances as the policy sees them."""
        needs = tuple(self.need(each) for each in self.held if _is_served(each))
        deployment = replace(self.ledger.deployment(time.monotonic()), unplaced=needs, changed=self.changed_at)
        return self.feed.view(self.ledger, deployment)

    def take_ends(self, message: RequestsEnded) -> None:
        """Learn which requests have ended."""
        self.ledger.end(message.rids)
        self.feed.ended(message.rids, message.outputs)

    @overrides("A health check goes to the leaders of the instances in turn.")
    def dispatch_health_check(self, req: Any) -> None:
        if self.operation is not None:
            self.held.append(req)
            return
        leaders = self.ledger.leaders
        self.health_round_robin_counter += 1
        sock_send(self.workers[leaders[self.health_round_robin_counter % len(leaders)]], req)

    def refuse(self, req: Any, why: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        """Answer a request with an error. No rank gets it."""
        self._finish(req, FINISH_ABORT(why, status).to_json())

    def _finish(self, req: Any, reason: Any) -> None:
        self.held_since.pop(req.rid, None)
        self.feed.ended([req.rid], [])
        answer = io_struct.AbortReq(rid=req.rid, finished_reason=reason, http_worker_ipc=req.http_worker_ipc)
        sock_send(self.to_tokenizer, answer)

    def abort(self, req: Any) -> None:
        """Abort requests on all instances, and those that are held.

        Ranks that change get the abort right after the change. Later its id may be the id of another request.
        As on a rank, an aborted request is no error, so it has no status.
        """
        kept = [each for each in self.held if not _aborts(req, each)]
        for each in self.held:
            if _aborts(req, each):
                self._finish(each, req.finished_reason or FINISH_ABORT(ABORTED).to_json())
        self.held = deque(kept)
        self._send(req, [leader for leader in self.ledger.leaders if leader not in self.ledger.busy])
        if self.ledger.busy:
            self.aborts.append(req)

    def release(self) -> None:
        """Handle what was held while ranks changed."""
        held, self.held = self.held, deque()
        for each in held:
            if _is_served(each):
                self.route(each)
            else:
                self._request_dispatcher(each)

    # --- control requests ---------------------------------------------------------------------------------------------

    def control(self, req: Any) -> None:
        """Send a control request to all leaders, or to the first one. Refuse what is not right now."""
        if self.operation is not None:
            self.held.append(req)
            return
        kind = answer_type(type(req))
        if isinstance(req, WHOLE_WORLD) and len(self.ledger.layout) > 1:
            self._answer(kind, req, success=False, message=MERGE_FIRST.format(ranks=self.world_size))
            return
        if isinstance(req, io_struct.PauseGenerationReqInput | io_struct.ContinueGenerationReqInput):
            self.paused = isinstance(req, io_struct.PauseGenerationReqInput)
        leaders = self.ledger.leaders[:1] if isinstance(req, READS) else self.ledger.leaders
        if kind is not None:
            self.gatherings.append(Gathering(req, kind, req.http_worker_ipc, len(leaders)))
        self._send(req, leaders)
        self.ended = isinstance(req, io_struct.ShutdownReq)

    def take_answer(self, answer: Any) -> None:
        """Take what a rank sends to the tokenizer. The answers to a control request are combined into one."""
        if isinstance(answer, io_struct.AbortReq):
            self.take_ends(RequestsEnded([answer.rid]))
        worker = getattr(answer, "http_worker_ipc", None)
        for gathering in self.gatherings:
            if gathering.kind is type(answer) and gathering.worker == worker:
                gathering.answers.append(answer)
                if len(gathering.answers) < gathering.count:
                    return
                self.gatherings.remove(gathering)
                answer = gathering.combined()
                self.updates.answered(gathering.request, answer)
                break
        if isinstance(answer, io_struct.GetInternalStateReqOutput):
            answer.internal_state.setdefault("shift", {})["instances"] = self.report()
        sock_send(self.to_tokenizer, answer)

    def refuse_session(self, req: Any) -> None:
        """Answer that no session is opened."""
        self._answer(io_struct.OpenSessionReqOutput, req, session_id=req.session_id, success=False)

    def _answer(self, kind: Any, req: Any, **values: Any) -> None:
        sock_send(self.to_tokenizer, kind(http_worker_ipc=req.http_worker_ipc, **values))

    def _send(self, req: Any, leaders: Iterable[int]) -> None:
        for leader in leaders:
            sock_send(self.workers[leader], req)

    # --- merges and splits --------------------------------------------------------------------------------------------

    def operate(self, req: ChangeInstancesReqInput) -> None:
        """Begin what an operator asks for. The answer is sent when all changes are made."""
        if req.level is None:
            self._report_to(req, "")
            return
        ranks = self.world_size - req.first if req.ranks is None else req.ranks
        try:
            check_range(self.ledger.levels, req.first, ranks, req.level)
            if why := self.why_not_now():
                raise ValueError(why)
            changes = plan(self.ledger.layout, req.first, ranks, req.level)
        except ValueError as error:
            self._report_to(req, str(error))
            return
        self.begin(Operation(deque(changes), req.reason, request=req))

    def consult(self) -> None:
        """Ask the policy for a layout, at most every :data:`POLICY_S` seconds, and begin to change to it.

        While a trainer is connected, all ranks stay one instance, because only then they can take new weights.
        """
        now = time.monotonic()
        serves_trainer = self.updates.groups and len(self.ledger.layout) == 1
        if now < self.policy_due or serves_trainer or self.why_not_now():
            return
        self.policy_due = now + POLICY_S
        deployment = replace(self.deployment(), denied=self.back_off.denied(now))
        wanted = self.policy.wanted(deployment)
        if wanted != deployment.layout and wanted not in deployment.denied:
            reason = ": ".join(filter(None, (f"the policy {self.policy_name}", self.policy.reason)))
            self.begin(Operation(deque(plan_layout(self.ledger.layout, wanted)), reason, wanted))

    def why_not_now(self) -> str:
        """Why no instances can merge or split now, in one sentence; empty if they can."""
        if self.operation is not None:
            return BUSY
        if self.updates.open:
            return UPDATING
        if self.paused:
            return PAUSED
        if self.gatherings:
            return ANSWERING.format(kind=self.gatherings[0].kind.__name__.removesuffix("Output"))
        return ""

    def begin(self, operation: Operation) -> None:
        """Make the changes of an operation, one after the other."""
        self.operation = operation
        self._next_change()

    def _next_change(self) -> None:
        operation = self.operation
        assert operation is not None
        if not operation.changes:
            self._end_operation("")
            return
        self.change = change = operation.changes.popleft()
        self.epoch += 1
        # From here on, nothing is sent to these ranks. What was sent before, they read before this message.
        self.ledger.busy = change.whole.ranks
        self.feed.moved(change.whole.ranks)
        targets = largest_targets(change, operation.wanted)
        message = ChangeLevelReq(
            self.epoch, change.whole.leader, change.whole.level, change.level, operation.reason,
            tuple(self.ledger.capacities[level] for level in targets),
        )  # fmt: skip
        for instance in change.before(self.ledger.layout):
            sock_send(self.workers[instance.leader], wrap_as_pickle(message))

    def take_change(self, message: LevelChanged) -> None:
        """Learn that ranks have changed their level, or did not."""
        operation, change = self.operation, self.change
        if operation is None or change is None or message.epoch != self.epoch:
            logger.warning("sglang_shift: ranks report a change that nobody waits for: %s", message)
            return
        operation.done.append(message)
        self.last.append({"time": time.time(), "why": operation.reason, **asdict(message)})
        self.ledger.busy, self.change, self.changed_at = range(0), None, time.monotonic()
        self.event_due = 0.0
        logger.info("sglang_shift: %s", sentence(message, change))
        if message.ok:
            self.policy.changed(sum(message.phases.values()))
            self.ledger.apply(change)
        self._send_aborts(change)
        if message.ok:
            self._next_change()
        else:
            self._end_operation(message.reason)

    def _send_aborts(self, change: Change) -> None:
        """Send the aborts that came during a change to the ranks that changed."""
        aborts, self.aborts = self.aborts, []
        for abort in aborts:
            self._send(abort, [leader for leader in self.ledger.leaders if leader in change.whole.ranks])

    def _end_operation(self, problem: str) -> None:
        operation, self.operation = self.operation, None
        assert operation is not None
        if operation.wanted:
            if problem:
                self.back_off.fail(operation.wanted, time.monotonic())
            else:
                self.back_off.succeed()
        elif problem and len(operation.done) > 1:
            count = len(operation.done) + len(operation.changes)
            levels = ", ".join(str(each.level) for each in self.ledger.layout)
            problem = HALFWAY.format(problem=problem, made=len(operation.done) - 1, count=count, levels=levels)
        if operation.request is not None:
            self._report_to(operation.request, problem, [asdict(each) for each in operation.done])
        self.release()

    def _report_to(self, req: ChangeInstancesReqInput, problem: str, changes: list[Any] | None = None) -> None:
        report = {**self.report(), "changes": changes or []}
        self._answer(ChangeInstancesReqOutput, req, success=not problem, message=problem, report=report)

    def report(self) -> dict[str, Any]:
        """The instances and the last changes as JSON values."""
        return {
            "levels": list(self.ledger.levels.sizes),
            "epoch": self.epoch,
            "instances": self.ledger.report(),
            "last": list(self.last),
            "policy": {"name": self.policy_name, **self.policy.report()},
        }

    def publish(self) -> None:
        """Send the event of the instances."""
        self.event_due = time.monotonic() + STATE_S
        self.publisher.send(InstancesEvent(time=time.time(), replica=self.publisher.replica, **self.report()))

    def take_capacities(self, message: InstancesReady) -> None:
        """Learn what instances hold, and send them the requests that came before."""
        self.ledger.capacities = dict(message.capacities)
        self.room = RoomRule(message.page_size, message.context)
        if self.policy_name == "paper":
            self.policy = PaperPolicy(self.ledger.rooms)
        elif message.costs is not None:
            seconds = max(message.costs.changes.values())
            self.policy = AutoPolicy(self.world_size, message.costs.levels, seconds)
        self.release()


def answer_type(kind: type) -> type | None:
    """The type of the answer to a control request, by SGLang's naming; None if there is no answer."""
    answer = getattr(io_struct, kind.__name__.removesuffix("Input") + "Output", None)
    return answer if isinstance(answer, type) else None


def prompt_tokens(req: Any) -> int:
    """The number of tokens of a request's prompt."""
    return len(req.input_ids if req.input_ids is not None else req.input_embeds)


def sentence(message: LevelChanged, change: Change) -> str:
    """What ranks did, for the log."""
    what = "merged into" if change.merges else f"split into instances of {change.level} from"
    if not message.ok:
        return f"instances were not {what} {change.whole}: {message.reason}"
    total = sum(message.phases.values())
    return (
        f"instances were {what} {change.whole} in {1e3 * total:.0f} ms; {message.bytes_sent} bytes sent, "
        f"{message.tokens_recomputed} tokens to compute again, {message.tokens_dropped} dropped"
    )


def _is_served(held: Any) -> bool:
    """Whether a message is a request that an instance serves. A health check is for any rank that leads."""
    return isinstance(held, REQUESTS) and not is_health_check_generate_req(held)


def _aborts(req: Any, held: Any) -> bool:
    """Whether an abort is for a request that is held. SGLang compares the beginnings of ids."""
    rid = getattr(held, "rid", None)
    return _is_served(held) and (req.abort_all or str(rid).startswith(req.rid))


def _starts_nothing(*_: Any) -> None:
    raise AssertionError("the launcher starts the ranks")


@relies_on(
    "sglang.srt.managers.data_parallel_controller:run_data_parallel_controller_process",
    "This function says what the process of a controller does before it makes the controller.",
)
def run_controller_process(server_args: Any, port_args: Any) -> None:
    """Run the controller in a process of its own, until the server is stopped."""
    setproctitle.setproctitle("sglang::instance_controller")
    faulthandler.enable()
    end_with_parent()
    parent = psutil.Process().parent()
    load_plugins()
    publish(server_args, role="dp_controller")
    configure_logger(server_args, prefix=" controller")
    carry_messages()
    try:
        InstanceController(server_args, port_args).event_loop()
    except Exception:
        logger.exception("sglang_shift: the controller of instances failed")
        if parent is not None:
            parent.send_signal(signal.SIGQUIT)
