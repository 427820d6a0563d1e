"""Run steps to measure them. The scheduler's own worker runs them, with made-up requests in free KV slots."""

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
"""How long a rank with a failed step waits for the results of the other ranks."""
EVICTION_DIVISOR = 4
"""During serving, a measured step may evict 1/4 of the KV pool from the prefix cache, oldest entries first."""


class SchedulerBench:
    """Runs steps on a scheduler's worker, in slots of its KV pool that no request uses.

    The requests are made up. Their KV cache is allocated but never computed. Attention takes the same time to read
    it.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler` that is built and idle.
        cpu_group: The ranks that measure together; by default those of the scheduler's instance or replica.

    Attributes:
        prepared_shape: The shape that :meth:`run` runs; None if no shape is prepared.
    """

    def __init__(self, scheduler: Any, cpu_group: Any = None) -> None:
        self.scheduler, self.cpu_group = scheduler, cpu_group
        self.prepared_shape: StepShape | None = None
        self._reqs: list[Any] = []
        self._batch: Any = None
        self._input_ids: torch.Tensor | None = None

    def make_room(self, shape: StepShape) -> bool:
        """Make room for a shape, and return whether there is room.

        The shape may use free slots, and a part of the slots of the prefix cache, which are then evicted. The rank
        with the least room decides for all ranks. All ranks evict the same number of tokens, so their prefix caches
        stay equal.
        """
        scheduler = self.scheduler
        allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        # A page of the allocator is larger than --page-size if ranks divide the cache by token.
        needed = shape.slots + 2 * allocator.page_size * len(shape.requests)
        missing_slots = max(0, needed - allocator.available_size())
        missing_rows = len(shape.requests) - scheduler.req_to_token_pool.available_size()
        evictable = min(cache.evictable_size(), scheduler.max_total_num_tokens // EVICTION_DIVISOR)
        most_missing_slots, unevictable_slots, most_missing_rows = self.agree(
            [missing_slots, missing_slots - evictable, missing_rows]
        )
        if unevictable_slots > 0 or most_missing_rows > 0:
            return False
        if most_missing_slots > 0:
            cache.evict(EvictParams(num_tokens=int(most_missing_slots)))
        return not self.agree([max(0, needed - allocator.available_size())])[0]

    def prepare(self, shape: StepShape, ids_by_request: Sequence[Sequence[int]] = ()) -> None:
        """Allocate the requests of the shape.

        Args:
            shape: The shape.
            ids_by_request: The token ids of each request; made-up ones by default.
        """
        self.release()
        sampling = SamplingParams(temperature=0, max_new_tokens=8)
        sampling.normalize(None)
        # A step that verifies drafts computes what a prefill of as many tokens computes. A model that pools has no
        # decode steps: their shapes extend each request by one token, so that the calibration has both phases.
        decode = shape.phase == "decode" and shape.width == 1 and self.scheduler.is_generation
        for i, (cached, new) in enumerate(shape.requests):
            made_up = (1 + t % 97 for t in range(cached if decode else cached + new))
            ids = array("q", ids_by_request[i] if ids_by_request else made_up)
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
        self._batch, self._input_ids, self.prepared_shape = batch, input_ids, shape

    def run(self, mode: Mode, after: Mode | None = None) -> float:
        """Run one step as serving does, and return its seconds.

        With overlap scheduling, serving prepares and launches a step while the GPU still runs the previous step. So
        with overlap scheduling, the timed step follows another step, and does not wait for it.

        Args:
            mode: The mode of the timed step.
            after: The mode of a step before it, which is not timed.
        """
        scheduler, worker = self.scheduler, self.scheduler.tp_worker
        on_gpu = worker.stopwatch.on_gpu
        if after is None and on_gpu and scheduler.enable_overlap:
            after = mode
        # The server runs its forwards on this stream. So activations here use the same memory as during serving.
        stream = scheduler.forward_stream if scheduler.enable_overlap else scheduler.schedule_stream
        stream.wait_stream(scheduler.device_module.current_stream())
        with scheduler.device_module.stream(stream), torch.no_grad():
            for each in (after, mode):
                if each is not None:
                    self._batch.input_ids = self._input_ids
                    with worker.model_runner.running_in(each):
                        self._forward()
        if on_gpu:
            torch.cuda.synchronize()
        return worker.last_lap.seconds

    def decode(self, ids: Sequence[int]) -> None:
        """Prepare a decode step after the step that ran. ``ids`` has a token for each request."""
        self._batch.prepare_for_decode()
        self._input_ids = torch.tensor(ids, dtype=torch.int64, device=self._batch.device)

    def forward(self, mode: Mode) -> torch.Tensor:
        """Run one step, and return its logits, ``[requests, vocabulary]``, or what a model that pools computes."""
        self._batch.input_ids = self._input_ids
        with torch.no_grad(), self.scheduler.tp_worker.model_runner.running_in(mode):
            output = self._forward()
        return output.clone()

    def _forward(self) -> torch.Tensor:
        """Run the batch on the worker. Return the logits of a model that generates, or the embeddings."""
        worker = self.scheduler.tp_worker
        if self.scheduler.is_generation:
            logits: torch.Tensor = worker.forward_batch_generation(self._batch).logits_output.next_token_logits
            return logits
        pooled = worker.forward_batch_embedding(self._batch)[0].embeddings
        return pooled if isinstance(pooled, torch.Tensor) else torch.stack(pooled)

    def _extend(self, cached: int, end: int | None) -> Any:
        """A batch that extends every request from ``cached`` tokens to ``end`` tokens, or to all of its tokens."""
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
        """Free the slots of the requests."""
        pool, allocator = self.scheduler.req_to_token_pool, self.scheduler.token_to_kv_pool_allocator
        for req in self._reqs:
            if req.kv.holds_kv:
                allocator.free(pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len].long())
                pool.free(req)
        self._reqs, self._batch, self._input_ids, self.prepared_shape = [], None, None, None

    def agree(self, numbers: Sequence[float], failure: str = "") -> list[float]:
        """Reduce each number to its largest value over all ranks. Collective.

        Args:
            numbers: One value of this rank for each number.
            failure: Why this rank's step failed; empty if it did not.

        Raises:
            ShiftError: this rank's step failed, and the other ranks do not answer. They wait in a collective of that
                step, so the ranks cannot continue. The error ends the server.
        """
        agreed = torch.tensor(numbers, dtype=torch.float64)
        group = self.cpu_group or self.scheduler.tp_cpu_group
        work = dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group, async_op=True)
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
