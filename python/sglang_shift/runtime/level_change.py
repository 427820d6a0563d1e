"""A change of the level of a rank while it serves: instances merge, or an instance splits.

All ranks that are affected run it at the same point of their loops, between two steps. Until the first byte of the KV
cache is sent, a change can be given up: then the requests go on at the level that they had. From then on, an error ends
the server, as an error in a step does.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from sglang.srt.managers.schedule_batch import Req

from sglang_shift.instances.messages import ChangeLevelReq, LevelChanged
from sglang_shift.instances.prefix_tree import PrefixTree, unite
from sglang_shift.instances.shares import share_out
from sglang_shift.kv.exchange import SCRATCH_BYTES, Volume
from sglang_shift.kv.layout import merged_pages
from sglang_shift.kv.split_plan import Claim, SplitPlan, plan_split
from sglang_shift.runtime.prefill_adder import forget_look_up
from sglang_shift.runtime.profiles import profile_is_open
from sglang_shift.runtime.quiesce import Retracted, drain, live_requests, retract
from sglang_shift.runtime.request_record import RequestRecord, reason_to_stay, record, restore_times
from sglang_shift.runtime.rng import random_state, set_random_state
from sglang_shift.seams import relies_on

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROFILE = "a profile runs or waits for a step; let it end, or end it (POST /stop_profile), then try again"


class GivenUp(Exception):
    """A change does not happen. All ranks raise it at the same point, with the reason as one sentence."""


@dataclass(frozen=True)
class Part:
    """What an instance brings into a merge. Its leader sends it.

    Attributes:
        level: The level of the instance.
        records: Its requests, in the order of its queue.
        tree: Its cached prefixes.
        counters: SGLang's counters that must be equal on all ranks of an instance.
        random_state: The state of the random numbers.
        backlog: What the leader received after the request for the change.
    """

    level: int
    records: list[RequestRecord]
    tree: PrefixTree
    counters: dict[str, float]
    random_state: Any
    backlog: list[Any]


@dataclass(frozen=True)
class PlannedSplit:
    """What a split would do.

    Attributes:
        plan: What happens to the pages.
        owners: The part of each request, in the order of the queue.
        lost: How many tokens of each request must be computed again.
    """

    plan: SplitPlan
    owners: list[int]
    lost: list[int]


OBSERVED = ("shift_steps", "shift_last_token")
"""What only a leader notes of its requests."""

PROCESSED = "processed_tokens_counter"
"""SGLang's counter of tokens of prompts, by which it knows for how long requests have waited."""

COUNTERS = ("forward_ct", PROCESSED)
"""SGLang's counters that decide something on each rank."""


@dataclass
class LevelChange:
    """One change, on one rank.

    Args:
        scheduler: A :class:`sglang_shift.runtime.instance_scheduler.InstanceScheduler`, between two steps.
        request: What the controller asks for.
        backlog: What this instance received after the request.
    """

    scheduler: Any
    request: ChangeLevelReq
    backlog: list[Any]
    phases: dict[str, float] = field(default_factory=dict)
    retracted: list[Retracted] = field(default_factory=list)
    recomputed: int = 0
    dropped: int = 0
    volume: Volume = field(default_factory=lambda: Volume(0, 0))

    def run(self) -> LevelChanged:
        """Change the level, or give up. All affected ranks call it.

        Returns:
            What happened, equal on all affected ranks but for the seconds.
        """
        switch, level = self.scheduler.shift_switch, self.request.level
        self.scheduler.cur_batch_for_debug = self.scheduler.running_batch  # SGLang's watchdog counts the time as a step
        highest = max(level, switch.level)
        self.group = switch.places[highest].group.cpu_group
        reason = ""
        try:
            if level > switch.level:
                self._merge(level)
            elif level < switch.level:
                self._split(level)
        except GivenUp as error:
            reason = str(error)
            self.recomputed = sum(self._gather(self._lost_in_place()))
        sent = sum(self._gather(self.volume.sent_bytes))
        return LevelChanged(
            epoch=self.request.epoch,
            first=self.request.first,
            ranks=self.request.ranks,
            level=level,
            phases=self.phases,
            bytes_sent=sent,
            tokens_recomputed=self.recomputed,
            tokens_dropped=self.dropped,
            ok=not reason,
            reason=reason,
        )

    # Merge

    def _merge(self, level: int) -> None:
        switch = self.scheduler.shift_switch
        low, factor = switch.level, level // switch.level
        self._check(level)
        self._quiesce()
        with self._phase("gather"):
            part, problem = self._try(self._part) if switch.place.leads else (None, None)
            every = self._gather((problem, part))
        self._agree([problem for problem, _ in every])
        parts = [part for _, part in every if part is not None]
        self._agree([None if [part.level for part in parts] == [low] * factor else "the instances have other levels"])
        rids = [each.rid for part in parts for each in part.records]
        self._agree([None if len(set(rids)) == len(rids) else "two requests have the same id"])
        with self._phase("plan"):
            united, problem = self._try(lambda: self._unite(parts))
            self._vote(problem)
            assert united is not None
            tree, pages = united
        with self._phase("exchange"):
            self.volume = switch.merge(level, pages)
        self._move_pages()
        with self._phase("rebuild"):
            self._rebuild(tree)
            self._adopt(parts)
            self.backlog = [message for part in parts for message in part.backlog]
            self._count_recomputed(tree, [each for part in parts for each in part.records])

    def _part(self) -> Part:
        scheduler = self.scheduler
        scheduler.shift_receipts.wait()
        computed = {each.req.rid: each.computed for each in self.retracted}
        records = [
            record(req, running=req.rid in computed, computed=computed.get(req.rid, 0))
            for req in scheduler.waiting_queue
        ]
        counters = {name: getattr(scheduler, name) for name in COUNTERS}
        counters["new_token_ratio"] = scheduler.new_token_ratio_tracker.current
        state = random_state(scheduler.device)
        tree = scheduler.tree_cache.read()
        return Part(scheduler.shift_switch.level, records, tree, counters, state, self.backlog)

    def _unite(self, parts: Sequence[Part]) -> tuple[PrefixTree, list[torch.Tensor]]:
        """The cached prefixes after a merge, and the pages that each part keeps, by their numbers in the part."""
        trees = [_renamed(part.tree, number, len(parts)) for number, part in enumerate(parts)]
        tree = unite(trees)
        pages = [
            [page for page, new in zip(part.tree.pages, renamed.pages, strict=True) if new in tree.pages]
            for part, renamed in zip(parts, trees, strict=True)
        ]
        self._give_up_for(self._memory_problem())
        return tree, [torch.tensor(sorted(each), dtype=torch.int64) for each in pages]

    @relies_on(
        "sglang.srt.constrained.grammar_manager:GrammarManager.clear",
        "This method forgets compiled grammars. Requests keep theirs.",
    )
    def _adopt(self, parts: list[Part]) -> None:
        """Queue the requests of all parts: first those that were running, then by their arrival."""
        scheduler = self.scheduler
        own = {req.rid: req for req in scheduler.waiting_queue}
        records = [each for part in parts for each in part.records]
        records.sort(key=lambda each: (not each.running, 0.0 if each.running else each.arrival))
        queue = [own[each.rid] if each.rid in own else scheduler.make_request(each) for each in records]
        for req, each in zip(queue, records, strict=True):
            restore_times(req, each)
        self._requeue(queue)
        for name in COUNTERS:
            setattr(scheduler, name, max(int(part.counters[name]) for part in parts))
        _keep_waited_tokens(queue, parts, scheduler.processed_tokens_counter)
        scheduler.new_token_ratio_tracker.current = max(part.counters["new_token_ratio"] for part in parts)
        set_random_state(scheduler.device, parts[0].random_state)
        scheduler.grammar_manager.clear()  # a rank that misses a grammar waits for the others, so all must miss it

    # Split

    def _split(self, level: int) -> None:
        scheduler, switch = self.scheduler, self.scheduler.shift_switch
        factor = switch.level // level
        part = switch.place.place // level
        self._check(level)
        self._quiesce()
        computed = {each.req.rid: each.computed for each in self.retracted}
        with self._phase("plan"):
            queue = scheduler.waiting_queue
            planned, problem = self._try(lambda: self._plan(level, factor, computed))
            self._vote(problem, _digest(planned.plan, planned.owners) if planned is not None else 0)
            assert planned is not None
            plan, owners = planned.plan, planned.owners
            self._share_observations(queue)
        with self._phase("exchange"):
            switch.pool.copy(plan.moves)
            pages = [torch.tensor(sorted(each.pages), dtype=torch.int64) for each in plan.trees]
            self.volume = switch.split(level, pages)
        self._move_pages()
        with self._phase("rebuild"):
            self._rebuild(plan.trees[part])
            self.recomputed = sum(planned.lost)
            self.dropped = plan.lost * switch.pool.layout.page_size
            self._requeue([req for owner, req in zip(owners, queue, strict=True) if owner == part])
            self.backlog = self.backlog if part == 0 else []

    def _share_observations(self, queue: list[Req]) -> None:
        """Give each rank what the leader has noted of the requests. The ranks that followed it have noted nothing."""
        mine = None
        if self.scheduler.shift_switch.place.leads:
            mine = {req.rid: {n: getattr(req, n) for n in OBSERVED if hasattr(req, n)} for req in queue}
        of_leader = next(each for each in self._gather(mine) if each is not None)
        for req in queue:
            for name in OBSERVED:
                vars(req).pop(name, None)
            vars(req).update(of_leader[req.rid])

    def _plan(self, level: int, factor: int, computed: dict[str, int]) -> PlannedSplit:
        """What happens to the pages and the requests in a split."""
        scheduler, switch = self.scheduler, self.scheduler.shift_switch
        layout, queue = switch.pool.layout, scheduler.waiting_queue
        if switch.place.leads:
            scheduler.shift_receipts.wait()
        tree = scheduler.tree_cache.read()
        owners, problem = self._owners(queue, factor, layout.tokens(level))
        claims = [Claim(owner, _cached_pages(tree, req)) for owner, req in zip(owners, queue, strict=True)]
        plan = plan_split(tree, claims, factor, factor * layout.last_page(level))
        lost = [
            _lost_tokens(plan.trees[owner], req, computed.get(req.rid, 0))
            for owner, req in zip(owners, queue, strict=True)
        ]
        self._give_up_for(problem or self._room_problem(queue, lost) or self._memory_problem())
        return PlannedSplit(plan, owners, lost)

    def _owners(self, queue: list[Req], factor: int, capacity: int) -> tuple[list[int], str | None]:
        """The part of each request, and the reason why some request fits no part."""
        needs = [self.scheduler.tokens_needed(req) for req in queue]
        limits = self.request.limits or (capacity,) * factor
        most, kept = max(limits), self.scheduler.shift_room.kept
        for req, need in zip(queue, needs, strict=True):
            if need > most:
                why = f"request {req.rid} may need {need - kept} tokens, and a part serves {most - kept}"
                return [0] * len(queue), why
        return share_out(needs, limits), None

    def _room_problem(self, queue: list[Req], lost: list[int]) -> str | None:
        """Why the parts cannot hold the KV cache of the requests if it shrinks; None if they can."""
        switch = self.scheduler.shift_switch
        if switch.tp_only:
            for req, tokens in zip(queue, lost, strict=True):
                if tokens >= switch.pool.layout.page_size:
                    return f"the parts have no room for {tokens} cached tokens of request {req.rid}"
        return None

    # Both

    def _move_pages(self) -> None:
        """Let weights give memory to the KV cache, or get it back."""
        if self.scheduler.shift_switch.pages is not None:
            with self._phase("weights"):
                self.scheduler.shift_switch.move_pages()

    def _check(self, level: int) -> None:
        """Give up for what is known before batches are emptied. So requests go through the queue only if they must."""
        with self._phase("check"):
            _, problem = self._try(lambda: self._check_requests(level))
            self._agree(self._gather(problem))

    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.begin_weight_update",
        "This method records an open weight update. Until its end, all ranks must stay one instance.",
    )
    def _check_requests(self, level: int) -> None:
        scheduler, switch = self.scheduler, self.scheduler.shift_switch
        if scheduler.weight_updater._session is not None:
            raise GivenUp("a weight update is open")
        if profile_is_open(scheduler.profiler_manager):
            raise GivenUp(PROFILE)
        queued = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
        requests = [*live_requests(scheduler), *queued]
        for req in requests:
            if problem := reason_to_stay(req):
                raise GivenUp(f"request {req.rid} {problem}")
        if level < switch.level:
            _, problem = self._owners(requests, switch.level // level, switch.pool.layout.tokens(level))
            self._give_up_for(problem)
        self._give_up_for(self._memory_problem())

    def _quiesce(self) -> None:
        """Empty all batches. An error ends the server, as an error in a step does."""
        scheduler = self.scheduler
        with self._phase("quiesce"):
            drain(scheduler)
            while scheduler.return_health_check_ipcs:
                scheduler.maybe_send_health_check_signal()
            self.retracted = retract(scheduler)

    def _try(self, step: Callable[[], T]) -> tuple[T | None, str | None]:
        """What a step returns, or why it failed.

        The step changes nothing. So this rank can tell the others that it failed, and all give the change up.
        """
        try:
            return step(), None
        except GivenUp as error:
            return None, str(error)
        except Exception as error:
            rank = self.scheduler.shift_switch.place.rank
            logger.exception("sglang_shift: rank %d cannot prepare a change of its level", rank)
            return None, f"rank {rank} failed with {type(error).__name__}: {' '.join(str(error).split())[:400]}"

    def _give_up_for(self, problem: str | None) -> None:
        if problem is not None:
            raise GivenUp(problem)

    def _memory_problem(self) -> str | None:
        """Why the exchange cannot run; None if it can."""
        try:
            torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=self.scheduler.device)
        except RuntimeError as error:
            return f"there is no memory for the exchange: {error}"
        return None

    def _rebuild(self, tree: PrefixTree) -> None:
        scheduler = self.scheduler
        scheduler.enter_instance(self.request.epoch)
        scheduler.tree_cache.write(tree)
        scheduler.shift_switch.pool.keep(torch.tensor(sorted(tree.pages), dtype=torch.int64))

    def _requeue(self, queue: list[Req]) -> None:
        self.scheduler.waiting_queue = queue
        for req in queue:
            self.scheduler.renew_limits(req)
            forget_look_up(req)  # ranks that have made it again know nothing of it

    def _count_recomputed(self, tree: PrefixTree, records: list[RequestRecord]) -> None:
        computed = {each.rid: each.computed for each in records}
        self.recomputed = sum(_lost_tokens(tree, req, computed[req.rid]) for req in self.scheduler.waiting_queue)

    def _lost_in_place(self) -> int:
        """The tokens that this instance computes again because it has emptied its batches in vain."""
        if not self.retracted or not self.scheduler.shift_switch.place.leads:
            return 0

        def lost() -> int:
            tree = self.scheduler.tree_cache.read()
            return sum(_lost_tokens(tree, each.req, each.computed) for each in self.retracted)

        return self._try(lost)[0] or 0

    def _vote(self, problem: str | None, digest: int = 0) -> None:
        """Go on only if no rank has a problem, and all ranks made the same plan."""
        votes = self._gather((problem, digest))
        self._agree([problem for problem, _ in votes])
        self._agree([None if len({digest for _, digest in votes}) == 1 else "the ranks made different plans"])

    def _agree(self, problems: list[str | None]) -> None:
        for problem in problems:
            self._give_up_for(problem)

    def _gather(self, value: Any) -> list[Any]:
        """The values of all affected ranks, in the order of the ranks. Collective."""
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = time.perf_counter() - begin


@relies_on(
    "sglang.srt.managers.schedule_policy:SchedulePolicy._sort_by_hrrn",
    "This method compares the counter of processed tokens with what it was when a request came.",
)
def _keep_waited_tokens(queue: list[Req], parts: list[Part], counter: int) -> None:
    """Let the counter of a merged instance say of each request for how many tokens it has waited in its part."""
    ahead = {each.rid: counter - int(part.counters[PROCESSED]) for part in parts for each in part.records}
    for req in queue:
        req.arrival_processed_tokens += ahead[req.rid]


def _renamed(tree: PrefixTree, part: int, factor: int) -> PrefixTree:
    return tree.renamed(lambda page: merged_pages(page, part, factor))


def _digest(plan: SplitPlan, owners: list[int]) -> int:
    return zlib.crc32(repr((plan.moves, owners, [sorted(tree.pages.items()) for tree in plan.trees])).encode())


def _cached_pages(tree: PrefixTree, req: Req) -> list[int]:
    """The pages of a request's tokens that are cached."""
    return tree.find([*req.origin_input_ids, *req.output_ids], (req.extra_key, req.cache_salt))


@relies_on(
    "sglang.srt.managers.schedule_batch:Req._compute_max_prefix_len",
    "This method says how many tokens of a request SGLang takes from the cache at most.",
)
def _lost_tokens(tree: PrefixTree, req: Req, computed: int) -> int:
    """Tokens of a request that were computed before, and are computed again."""
    pages = _cached_pages(tree, req)
    size = len(tree.pages[pages[0]].tokens) if pages else 1
    kept = min(len(pages) * size, req._compute_max_prefix_len(req.seqlen))
    return max(0, computed - kept)
