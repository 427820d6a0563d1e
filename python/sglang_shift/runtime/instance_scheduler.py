"""The scheduler of a rank whose instance merges and splits while it serves."""

from __future__ import annotations

import copy
import logging
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler_components.recv_skipper import SchedulerRecvSkipper
from sglang.srt.runtime_context import get_context
from sglang.srt.utils import rank_consensus_checker

from sglang_shift.flags import AUTO
from sglang_shift.instances.levels import Levels
from sglang_shift.instances.messages import (
    ChangeLevelReq,
    InstancesReady,
    LevelChanged,
    LevelCosts,
    QueueLength,
    RequestsHeld,
    StepsMeasured,
)
from sglang_shift.instances.room import RoomRule
from sglang_shift.modes import Mode, StepState
from sglang_shift.policy.selector import Drift
from sglang_shift.runtime.agreement import StepWatch
from sglang_shift.runtime.calibrator import Calibrator
from sglang_shift.runtime.instance_cache import BACKEND, InstanceCache
from sglang_shift.runtime.instance_channels import InstanceChannels
from sglang_shift.runtime.instance_queue import GOES_FIRST, RunningFirstPolicy
from sglang_shift.runtime.level_change import LevelChange
from sglang_shift.runtime.level_costs import LevelMeasurements
from sglang_shift.runtime.level_switch import LevelSwitch
from sglang_shift.runtime.penalties import seed_penalties
from sglang_shift.runtime.rank_consensus import compare_in, groups_of_levels
from sglang_shift.runtime.reporter import StepReporter
from sglang_shift.runtime.request_record import RequestRecord, keep_request, restore, restore_grammar
from sglang_shift.runtime.scheduler import ShiftScheduler
from sglang_shift.seams import overrides, relies_on

logger = logging.getLogger(__name__)

ALONE = "the instance has only the ranks that divide the weights"
"""The reason for which all steps run in TP in an instance whose S is 1: of one rank, unless S is less than P."""

FREED = "the instance has freed the weights that SP needs"
"""The reason for which all steps of a merged instance run in TP with ``--merge-weights free``."""

QUEUE_S = 0.1
"""The least seconds between two reports of a queue that is not empty."""


class InstanceScheduler(InstanceChannels, ShiftScheduler):
    """Our scheduler, as a part of an instance.

    SGLang builds it for all ranks of the world. Then it goes to the lowest level. A :class:`ChangeLevelReq` makes it
    merge with its neighbours, or split.

    Attributes:
        shift_switch: The levels of this rank.
        shift_room: How much KV cache a request needs.
        shift_calibrators: The calibrator of each level.
    """

    shift_switch: LevelSwitch
    shift_room: RoomRule
    shift_calibrators: dict[int, Calibrator]
    tree_cache: InstanceCache
    tp_size: int

    _made: list[Req] | None = None  # collects requests that are made again, instead of the queue
    _change: ChangeLevelReq | None = None
    _backlog: tuple[Any, ...] = ()
    _costs: LevelCosts | None = None  # what the controller knows of the levels, if its policy needs it
    _told_waiting: int | None = None
    _queue_due = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        get_context().override("sglang_shift.instances", radix_cache_backend=BACKEND)
        self._drifts: dict[int, Drift] = defaultdict(Drift)
        super().__init__(*args, **kwargs)
        levels, frees = self.shift_levels(), self.shift_config.merge_weights == "free"
        self.shift_switch = switch = LevelSwitch(self.tp_worker.model_runner, levels, frees=frees)
        self.shift_room = RoomRule(self.page_size, self.model_config.context_len)
        most, _, most_input = self._sizes(switch.pool.layout.tokens(levels.world_size))
        self._largest = {"max_total_num_tokens": most, "max_req_input_len": most_input}
        self.tree_cache.make_room(most + self.page_size)
        self.shift_consensus = groups_of_levels(switch.places)
        measurements = LevelMeasurements(self, levels)
        self.shift_calibrators = measurements.calibrators
        switch.enter(levels.lowest)
        self.enter_instance(0)
        self.tree_cache.reset()
        if self.shift_config.calibration != "off":
            measurements.calibrate()
        self._costs = costs = measurements.costs() if self.shift_config.instance_policy == AUTO else None
        layout = self.shift_switch.pool.layout
        if self.shift_switch.place.rank == 0:
            if switch.pages is not None:
                logger.info("sglang_shift: --merge-weights free: %s", switch.pages.text())
            capacities = {level: layout.tokens(level) for level in levels.sizes}
            self.tell_controller(InstancesReady(capacities, self.shift_room.context, costs, self.page_size))

    def shift_levels(self) -> Levels:
        """The levels of the world, as the flags say."""
        config = self.shift_config
        return Levels.of_flags(config.world_size, config.instances, config.merge_levels)

    @overrides("Our order of the queue lets requests go first that ran before a change of the level.")
    def init_schedule_policy(self) -> None:
        super().init_schedule_policy()
        self.policy = RunningFirstPolicy(
            self.schedule_policy, self.tree_cache, self.enable_hierarchical_cache, self.enable_priority_scheduling,
            self.schedule_low_priority_values_first,
        )  # fmt: skip

    @overrides("The tokenizer manager must accept what the largest instance holds.")
    def get_init_info(self) -> dict[str, Any]:
        return {**super().get_init_info(), **getattr(self, "_largest", {})}

    # Changes of the level

    @overrides("A request for a change of the level ends what is handled before the change.")
    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """Handle requests, up to one for a change of the level. What follows it is handled after the change."""
        for number, request in enumerate(recv_reqs):
            if isinstance(request, ChangeLevelReq):
                self._change, self._backlog = request, tuple(recv_reqs[number + 1 :])
                return super().process_input_requests(recv_reqs[:number])
        return super().process_input_requests(recv_reqs)

    @overrides("The level changes between two steps, after the requests that came before are queued.")
    def ingest_requests(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Receive and handle requests. If one asks for a change of the level, make it."""
        self._report_queue()
        received: list[Any] = super().ingest_requests(*args, **kwargs)
        while (request := self._change) is not None:
            self._change = None
            change = LevelChange(self, request, list(self._backlog))
            self._report(change.run())
            self.process_input_requests(change.backlog)
        return received

    def _report_queue(self) -> None:
        """Tell the controller how many requests the last step has left in the queue, if its policy needs it."""
        if self.shift_config.instance_policy != AUTO or not self.shift_switch.place.leads:
            return
        waiting, now = len(self.waiting_queue), time.monotonic()
        if waiting != self._told_waiting and (not waiting or now >= self._queue_due):
            self._told_waiting, self._queue_due = waiting, now + QUEUE_S
            self.tell_controller(QueueLength(self.shift_switch.place.rank, waiting))

    def _report(self, changed: LevelChanged) -> None:
        place = self.shift_switch.place
        self._told_waiting = None  # the controller has forgotten the queues of these ranks
        if place.leads:
            self.tell_controller(RequestsHeld(place.rank, [req.rid for req in self.waiting_queue]))
        if place.rank == changed.first:
            logger.info("sglang_shift: %s", changed)
            self.tell_controller(changed)

    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler.init_model_worker",
        "This method copies the groups and the sizes that a scheduler uses.",
    )
    @relies_on(
        "sglang.srt.managers.tp_worker:TpModelWorker.get_worker_info",
        "This method says how the largest request follows from the size of the KV cache.",
    )
    @relies_on(
        "sglang.srt.constrained.grammar_manager:GrammarManager.__init__",
        "This method copies the group over which ranks agree that a grammar is compiled.",
    )
    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.__post_init__",
        "This method copies the group over which ranks wait for new weights.",
    )
    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler.emit_metrics_constants",
        "This method sets the gauges that SGLang sets once, such as the size of the KV cache.",
    )
    @relies_on(
        "sglang.srt.managers.schedule_policy:SchedulePolicy._touch_waiting_prefixes",
        "This method counts steps with a queue. Each 32nd one decides which cached prefixes are evicted later.",
    )
    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler._should_defer_prefill",
        "This method counts the decode steps until the next prefill.",
    )
    def enter_instance(self, epoch: int) -> None:
        """Replace all that has copied a group or a size of the level before. No request is in a batch.

        Args:
            epoch: The number of the change, equal on all ranks of the instance.
        """
        if self.shift_calibrator.level == self.tp_size:  # a level without a calibrator has that of all ranks
            self.shift_calibrator.leave(self.shift_selector.count)
        place = self.shift_switch.place
        compare_in(self.shift_consensus[place.size])
        group = place.group
        self.tp_size, self.tp_group, self.tp_cpu_group = place.size, group, group.cpu_group
        self.attn_tp_group, self.attn_tp_cpu_group = group, group.cpu_group
        self.dp_tp_group, self.dp_tp_cpu_group = group, group.cpu_group
        self.max_total_num_tokens, self.max_req_len, self.max_req_input_len = self._sizes(self.shift_switch.pool.size)
        self.weight_updater.tp_cpu_group = group.cpu_group
        grammars = self.grammar_manager
        grammars.grammar_sync_group, grammars.grammar_sync_size = group.cpu_group, place.size
        grammars.grammar_sync_entry, grammars.is_grammar_sync_entry = group.first_rank, group.is_first_rank
        self.tree_cache.regroup(group)
        self.beam_coordinator.max_req_len = self.max_req_len
        self.init_pool_stats_observer()
        self.init_invariant_checker()
        self.init_load_inquirer()
        self.init_kv_events_publisher()
        self.recv_skipper = SchedulerRecvSkipper.maybe_create()  # it counts steps
        self.policy._waiting_prefix_refresh_calls = 0
        self._prefill_decode_interval_remaining = 0
        self.init_request_receiver()
        self.lead(place.leads)
        self.emit_metrics_constants()
        self._renew_modes(epoch)

    def _sizes(self, tokens: int) -> tuple[int, int, int]:
        """SGLang's sizes for a KV cache of so many tokens: the cache, a request, and the prompt of a request.

        Prompts must be shorter than the last number, or SGLang cuts them to it. SGLang's own number forgets the page
        that it keeps free when it admits a request.
        """
        longest = min(self.model_config.context_len, tokens) - 1
        return tokens, longest, min(longest - 5, self.shift_room.longest_prompt(tokens))

    def _renew_modes(self, epoch: int) -> None:
        """Choose modes as at the start, because the ranks of a merged instance have seen different steps."""
        place = self.shift_switch.place
        self.shift_watch.stop()
        store = dist.PrefixStore(
            f"sglang_shift/steps/{place.instance.leader}/{epoch}", dist.distributed_c10d._get_default_store()
        )
        self.shift_watch = StepWatch(place.place, store)
        if place.size > 1:
            self.shift_watch.start()
        self.shift_exchange_counter.volume = self.tp_worker.model_runner.exchange_volume
        # Instances without the weights for SP have no times of their own, and nothing to choose.
        calibrators = self.shift_calibrators
        self.shift_calibrator = calibrators.get(place.size, calibrators[max(calibrators)])
        self.shift_selector.calibration = calibration = self.shift_calibrator.calibration
        if calibration is not None:
            rank_consensus_checker.assert_same(
                "sglang_shift uses times of %s, %s s", calibration.made, calibration.took
            )
        self.set_policy(self.shift_config)
        self.shift_selector.restart()
        self.shift_chunks.restart()
        if self.shift_reporter is not None:
            self.shift_reporter.on_level(self._drifts[place.size])

    def renew_calibration(self) -> bool:
        """As without instances, for the level of this instance. The controller learns the new times."""
        switch, costs = self.shift_switch, self._costs
        matters = self._decides_by_times or self.shift_calibrator.measuring  # what has begun must end
        if switch.tp_only or not matters or not super().renew_calibration():
            return False
        calibration = self.shift_calibrator.calibration
        if costs is not None and calibration is not None and switch.place.leads:
            self.tell_controller(StepsMeasured(replace(costs.levels[switch.level], costs=calibration.costs)))
        return True

    @property
    def _decides_by_times(self) -> bool:
        """Whether something is chosen by the step times of this level: the mode, the layout, or the chunk."""
        auto = self.shift_config.instance_policy == AUTO
        return self.shift_switch.place.has_sp or auto or self.shift_chunks.active

    def make_reporter(self) -> StepReporter:
        """A reporter that also compares the times of steps that need TP only because S is 1."""
        reporter = super().make_reporter()
        reporter.timed_reasons |= {ALONE}
        return reporter

    @property
    def shift_calibrated(self) -> bool:
        """Whether each level has step times. Instances of different levels must give an operator the same answer."""
        return all(each.calibration is not None for each in self.shift_calibrators.values())

    def shift_modes(self) -> tuple[Mode, ...]:
        """The modes of this level. If S is 1, all steps run in TP."""
        return super().shift_modes() if self.shift_switch.place.has_sp else (Mode.TP,)

    def step_state(self, batch: ScheduleBatch) -> StepState:
        """The state that the policy gets. If S is 1, or weights are freed, each step needs TP."""
        state, switch = super().step_state(batch), self.shift_switch
        if switch.tp_only:
            return replace(state, needs_tp=FREED)
        return state if switch.place.has_sp else replace(state, needs_tp=state.needs_tp or ALONE)

    # Requests

    @overrides("Our method keeps what the tokenizer manager sent, because another rank may have to make the request.")
    def _create_generation_req(self, recv_req: TokenizedGenerateReqInput, *args: Any, **kwargs: Any) -> Req:
        req: Req = super()._create_generation_req(recv_req, *args, **kwargs)
        keep_request(req, recv_req)
        return req

    @overrides("A request that is made again gets its place in the queue later.")
    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        if self._made is None:
            setattr(req, GOES_FIRST, False)
            super()._add_request_to_queue(req, is_retracted)
        else:
            self._made.append(req)

    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler._handle_generate_request",
        "This method makes a request, and queues it, or lets its grammar be compiled before.",
    )
    def make_request(self, record: RequestRecord) -> Req:
        """Make a request that another rank has, in the state that it has there.

        Raises:
            RuntimeError: SGLang refuses the request here.
        """
        request = copy.copy(record.request)
        request.sampling_params = copy.copy(request.sampling_params)
        compiled = self.grammar_manager.grammar_queue
        self._made = []
        try:
            self.handle_generate_request(request)
            made = self._made or compiled
            if not made:
                raise RuntimeError(f"rank {self.shift_switch.place.rank} cannot make request {record.rid} again")
            req = made.pop()
        finally:
            self._made = None
        restore(req, record)
        restore_grammar(req, record, self.grammar_manager)
        return req

    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler.init_req_max_new_tokens",
        "This method limits the output of a request to what the KV cache can hold.",
    )
    def renew_limits(self, req: Req) -> None:
        """Limit the output of a request to what this instance can hold, and not to what another one could.

        SGLang admits a request by this limit, also one that it will abort. So it must be equal on all ranks.
        """
        asked = req.shift_request.sampling_params
        req.sampling_params.max_new_tokens = asked.max_new_tokens
        req.sampling_params.min_new_tokens = asked.min_new_tokens
        self.init_req_max_new_tokens(req)

    def tokens_needed(self, req: Req) -> int:
        """The tokens that the KV cache of an instance must have for a request.

        If this instance cannot hold all that the request asked for, these are the tokens that it has, and one more.
        """
        asked = req.shift_request.sampling_params.max_new_tokens
        prompt, generated = len(req.origin_input_ids), len(req.output_ids)
        return self.shift_room.need(prompt, asked, self.max_total_num_tokens, generated)

    @overrides("Penalties must count the tokens that a request had before the level changed.")
    def _get_new_batch_prefill_raw(self, *args: Any, **kwargs: Any) -> Any:
        batch, running = super()._get_new_batch_prefill_raw(*args, **kwargs)
        if batch is not None:
            seed_penalties(batch)
        return batch, running
