"""Steps for measuring, run by a scheduler's own worker: made-up requests in free slots of its KV pool."""

from __future__ import annotations

import datetime
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_shift.cost.measure import StepShape
from sglang_shift.errors import ShiftError
from sglang_shift.modes import Mode

WAIT = datetime.timedelta(seconds=60)
"""How long a rank whose step failed waits for the others to say how theirs went."""
EVICTED_SHARE = 4
"""A step that is measured while serving may take 1/4 of the KV pool from the prefix cache, oldest entries first."""


class SchedulerBench:
    """Runs steps on a scheduler's worker, with slots of its KV pool that hold no request's KV cache.

    The requests are made up; their KV cache is allocated and never computed, which takes as long to
    read.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler` that is built and idle.

    Attributes:
        prepared: The shape whose steps can run now.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.prepared: StepShape | None = None
        self._reqs: list[Any] = []
        self._batch: Any = None
        self._input_ids: torch.Tensor | None = None

    def make_room(self, shape: StepShape) -> bool:
        """Whether the shape fits into free slots and a part of those of the prefix cache, which are then freed.

        All ranks decide by the least that any of them has, and evict the same number of tokens, so that
        their prefix caches stay alike.
        """
        scheduler = self.scheduler
        allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        needed = shape.slots + 2 * scheduler.page_size * len(shape.requests)
        short = max(0, needed - allocator.available_size())
        rows = len(shape.requests) - scheduler.req_to_token_pool.available_size()
        evictable = min(cache.evictable_size(), scheduler.max_total_num_tokens // EVICTED_SHARE)
        most_short, too_short, rows_short = self.agree([short, short - evictable, rows])
        if too_short > 0 or rows_short > 0:
            return False
        if most_short > 0:
            cache.evict(EvictParams(num_tokens=int(most_short)))
        return not self.agree([max(0, needed - allocator.available_size())])[0]

    def prepare(self, shape: StepShape) -> None:
        """Allocate the shape's requests."""
        self.release()
        sampling = SamplingParams(temperature=0, max_new_tokens=8)
        sampling.normalize(None)
        decode = shape.phase == "decode"
        for i, (cached, new) in enumerate(shape.requests):
            ids = array("q", [1 + t % 97 for t in range(cached if decode else cached + new)])
            req = Req(f"calibration {i}", "", ids, sampling, vocab_size=self.scheduler.model_config.vocab_size)
            req.full_untruncated_fill_ids = ids
            req.logprob_start_len = -1
            self._reqs.append(req)
        if decode or not shape.context:
            batch = self._extend(0, None)
        else:
            self._extend(0, shape.context)
            batch = self._extend(shape.context, None)
        if decode:
            input_ids = torch.ones(len(self._reqs), dtype=torch.int64, device=batch.device)
            batch.prepare_for_decode()
        else:
            input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
        self._batch, self._input_ids, self.prepared = batch, input_ids, shape

    def run(self, mode: Mode, after: Mode | None = None) -> float:
        """Run one step as serving does; its seconds.

        With overlap scheduling, serving prepares and launches a step while the GPU still runs the one before.
        So there the step that is timed follows another one, without waiting for it.
        """
        scheduler, worker = self.scheduler, self.scheduler.tp_worker
        on_gpu = worker.stopwatch.on_gpu
        if after is None and on_gpu and scheduler.enable_overlap:
            after = mode
        # Where the forwards of the server run, so that the memory of their activations is the same.
        stream = scheduler.forward_stream if scheduler.enable_overlap else scheduler.schedule_stream
        stream.wait_stream(scheduler.device_module.current_stream())
        with scheduler.device_module.stream(stream), torch.no_grad():
            for each in (after, mode):
                if each is not None:
                    self._batch.input_ids = self._input_ids
                    with worker.model_runner.running_in(each):
                        worker.forward_batch_generation(self._batch)
        if on_gpu:
            torch.cuda.synchronize()
        return worker.last_lap.seconds

    def _extend(self, cached: int, end: int | None) -> Any:
        """A batch that extends every request from ``cached`` tokens to ``end``, or to all it has."""
        scheduler = self.scheduler
        for req in self._reqs:
            req.prefix_len = cached
            req.extend_end = len(req.origin_input_ids) if end is None else end
        batch = ScheduleBatch.init_new(
            reqs=list(self._reqs),
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
        for req in self._reqs:
            if req.kv.holds_kv:
                allocator.free(pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len].long())
                pool.free(req)
        self._reqs, self._batch, self._input_ids, self.prepared = [], None, None, None

    def agree(self, numbers: Sequence[float], failure: str = "") -> list[float]:
        """The largest of each number over all ranks.

        Raises:
            ShiftError: ``failure`` is this rank's, and the others do not answer: they wait in a collective of the
                step that failed here. Nothing can be mended then; the error ends the server.
        """
        agreed = torch.tensor(numbers, dtype=torch.float64)
        work = dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.scheduler.tp_cpu_group, async_op=True)
        try:
            work.wait(*([WAIT] if failure else []))
        except RuntimeError as error:
            if not failure:
                raise
            raise ShiftError(
                f"a calibration step failed on rank {self.scheduler.tp_rank} alone ({failure}), and the other ranks "
                f"wait for it; start the server with --shift-calibration off if that does not go away"
            ) from error
        return agreed.tolist()
