"""Steps for measuring, run by a scheduler's own worker: made-up requests in free slots of its KV pool."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_shift.measuring import Shape
from sglang_shift.modes import Mode
from sglang_shift.region import region


class SchedulerBench:
    """Runs steps on a scheduler's worker, with slots of its KV pool that are free.

    The requests are made up; their KV cache is allocated and never computed, which takes as long to
    read.

    Args:
        scheduler: A :class:`sglang_shift.scheduler.ShiftScheduler` that is built and idle.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.reqs: list[Any] = []

    def prepare(self, shape: Shape) -> Callable[[Mode], float]:
        """Allocate the shape's requests; the result runs one step of them."""
        sampling = SamplingParams(temperature=0, max_new_tokens=8)
        sampling.normalize(None)
        decode = shape.phase == "decode"
        for i, (cached, new) in enumerate(shape.requests):
            ids = array("q", [1 + t % 97 for t in range(cached if decode else cached + new)])
            req = Req(f"calibration {i}", "", ids, sampling, vocab_size=self.scheduler.model_config.vocab_size)
            req.full_untruncated_fill_ids = ids
            req.logprob_start_len = -1
            self.reqs.append(req)
        if decode or not shape.context:
            batch = self._extend(0, None)
        else:
            self._extend(0, shape.context)
            batch = self._extend(shape.context, None)
        if decode:
            input_ids = torch.ones(len(self.reqs), dtype=torch.int64, device=batch.device)
            batch.prepare_for_decode()
        else:
            input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
        worker = self.scheduler.tp_worker

        exchange = region.groups.exchange

        def run(mode: Mode) -> float:
            batch.input_ids = input_ids
            with torch.no_grad(), worker.model_runner.running_in(mode), exchange.uncounted():
                worker.forward_batch_generation(batch)
            if worker.stopwatch.on_gpu:
                torch.cuda.synchronize()
            return worker.last_lap.seconds

        return run

    def _extend(self, cached: int, end: int | None) -> Any:
        """A batch that extends every request from ``cached`` tokens to ``end``, or to all it has."""
        scheduler = self.scheduler
        for req in self.reqs:
            req.prefix_len = cached
            req.extend_end = len(req.origin_input_ids) if end is None else end
        batch = ScheduleBatch.init_new(
            reqs=list(self.reqs),
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            model_config=scheduler.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        return batch

    def release(self) -> None:
        """Give the requests' slots back."""
        pool, allocator = self.scheduler.req_to_token_pool, self.scheduler.token_to_kv_pool_allocator
        for req in self.reqs:
            if req.kv.holds_kv:
                allocator.free(pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len].long())
                pool.free(req)
        self.reqs = []

    def fits(self, shape: Shape) -> bool:
        """Whether enough slots and rows are free, without evicting any; the same on every rank."""
        slots = self.scheduler.token_to_kv_pool_allocator.available_size()
        rows = self.scheduler.req_to_token_pool.available_size()
        page = self.scheduler.page_size
        return shape.slots + 2 * page * len(shape.requests) <= slots and len(shape.requests) <= rows

    def agree(self, seconds: Sequence[float]) -> list[float]:
        """The largest of each number over all ranks."""
        numbers = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.scheduler.tp_cpu_group)
        return numbers.tolist()
