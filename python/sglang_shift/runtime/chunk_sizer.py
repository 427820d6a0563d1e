"""Chooses the chunk of each step under a bound on the gap between tokens (``--shift-tbt-target``).

All of it follows from state that is equal on every rank. The margin comes from rank 0's clock, and all ranks agree on
it: :meth:`ChunkSizer.margin` is set on every rank in the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from sglang.srt.beam_search.batch_tail import num_beam_member_rows
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_shift.cost.chunk_budget import FLOOR, ChunkBudget, Decodes
from sglang_shift.cost.chunk_share import ChunkShare
from sglang_shift.cost.measure import kv_reads
from sglang_shift.modes import Mode
from sglang_shift.runtime.prefill_adder import TP_ONLY, ShiftPrefillAdder
from sglang_shift.runtime.tp_only import reason_for_tp

AGREE_STEPS = 64
"""Steps after which the ranks agree on the margin again."""


@dataclass(frozen=True)
class Chunk:
    """What was decided for a step with prompts.

    Attributes:
        tokens: The prompt tokens that the step takes.
        room: The prompt tokens that the step could take.
        predicted: Seconds that the prompts take, with the decodes that share the step with them.
        budget: Seconds that they may take.
        decodes: The requests that decode meanwhile.
    """

    tokens: int
    room: int
    predicted: float
    budget: float
    decodes: Decodes

    @property
    def floor_rules(self) -> bool:
        """Whether the step takes longer than its budget, so that the prompts progress."""
        return self.predicted > self.budget

    @property
    def uses_budget(self) -> bool:
        """Whether the step takes most of its budget. Only then does it matter how exact the prediction is."""
        return 2 * self.predicted >= self.budget


class ChunkSizer:
    """The chunk sizes of one rank. All ranks call each method at the same point.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler` that is built.

    Attributes:
        target: The bound in seconds; 0 for none.
        margin: As in :class:`ChunkBudget`.
        share: How waiting prompts and a long prompt share steps.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.target = 0.0
        self.margin = 1.0
        self.share = ChunkShare()
        self._adder: ShiftPrefillAdder | None = None
        self._decode_is_due = False
        self._last: Chunk | None = None
        self._steps = {"mixed": 0, "alternating": 0, "floor": 0}
        self._can_mix = bool(scheduler.is_mixed_chunk)
        # A target turns mixed chunks on. Without it, they are as the user asked.
        as_asked = scheduler.server_args.enable_mixed_chunk or not scheduler.shift_config.tbt_target
        self._mixes_without_target = self._can_mix and bool(as_asked)

    @property
    def active(self) -> bool:
        """Whether there is a bound, and step times to keep it."""
        return self.target > 0 and self.scheduler.shift_selector.calibration is not None

    def restart(self) -> None:
        """Forget what was learned from steps so far, because other ranks have seen other steps. No step has begun."""
        self.margin, self.share, self._adder, self._decode_is_due = 1.0, ChunkShare(), None, False

    def must_agree(self, steps: int) -> bool:
        """Whether all ranks must agree on the margin now, after a number of steps."""
        return self.active and steps % AGREE_STEPS == 0

    def budget(self) -> ChunkBudget:
        """The budget of the next step. The bound must be active."""
        scheduler = self.scheduler
        selector = scheduler.shift_selector
        floor = max(FLOOR, scheduler.page_size, scheduler.truncation_align_size or 0)
        modes = scheduler.shift_modes()
        return ChunkBudget(selector.calibration.costs, self.target, self.margin, floor, modes, self._padded)

    def _padded(self, has_prompts: bool, tokens: int) -> dict[Mode, int]:
        scheduler = self.scheduler
        graphs = scheduler.tp_worker.model_runner.graphs.for_phase(has_prompts)
        padded: dict[Mode, int] = graphs.padded(tokens, 1 if has_prompts else scheduler.shift_width)
        return padded

    def make_adder(self, *args: Any, **kwargs: Any) -> ShiftPrefillAdder:
        """Make SGLang's object that fills the next step with prompts. The arguments are those of SGLang's class."""
        self._adder = adder = ShiftPrefillAdder(*args, **kwargs)
        running, budget = adder.running_batch, self.budget()
        if any(map(self.needs_tp, running.reqs)):
            budget = replace(budget, modes=TP_ONLY)
        waiting = self.scheduler.waiting_queue
        adder.start(budget, self.decodes_of(running), self.share, waiting, self.needs_tp, self.adapter_fits)
        return adder

    def needs_tp(self, req: Req) -> bool:
        """Whether a step with prompts must run in TP if it has this request."""
        rules = self.scheduler.shift_tp_rules
        return (
            bool(rules)
            and reason_for_tp(rules, SimpleNamespace(reqs=[req], forward_mode=ForwardMode.EXTEND)) is not None
        )

    def adapter_fits(self, req: Req, adapters: set[str | None]) -> bool:
        """Whether SGLang can run a prompt in a step with these adapters.

        If SGLang loads adapters while it computes, this question would begin to load one. So the answer is yes.
        """
        scheduler = self.scheduler
        if not scheduler.enable_lora or scheduler.enable_lora_overlap_loading:
            return True
        return bool(scheduler.can_schedule_lora_req(req, adapters))

    def mixes(self, running: ScheduleBatch) -> bool:
        """Whether the next step decodes these requests, if it has prompts.

        They take a part of SGLang's chunk. If they take most of it, prompts get steps of their own.
        """
        if not self.active:
            return self._mixes_without_target
        fits = 2 * running.batch_size() <= self.scheduler.chunked_prefill_size
        alone = running.return_logprob or running.return_hidden_states  # a step with prompts returns them differently
        return self._can_mix and fits and not alone and all(req.beam_group is None for req in running.reqs)

    def decodes_of(self, running: ScheduleBatch) -> Decodes:
        """The requests of a batch that decode while prompts are computed."""
        if running.is_empty() or running.is_prefill_only:
            return Decodes()
        width = self.scheduler.shift_width
        reads = sum(kv_reads(max(0, req.seqlen - 1), width) for req in running.reqs)
        return Decodes(
            len(running.reqs) + num_beam_member_rows(running.reqs), reads, width, self.scheduler.is_mixed_chunk
        )

    def take_chunk(self, batch: ScheduleBatch) -> Chunk | None:
        """The decision for a batch that is about to run; None if no bound applies to it. Call it for each batch."""
        adder, self._adder = self._adder, None
        self._decode_is_due = False
        if not self.active or adder is None or not batch.forward_mode.is_extend():
            return None
        decodes = adder.decodes
        # SGLang decides at the end whether it mixes, for example by the free memory.
        self._decode_is_due = bool(decodes.requests) and not batch.decoding_reqs
        if not decodes.requests:
            return None
        seconds, budget = adder.budget.step_seconds(adder.prompts, decodes), adder.budget.prompt_seconds(decodes)
        self._last = chunk = Chunk(adder.prompts.tokens, adder.room, seconds, budget, decodes)
        self._steps["mixed" if batch.decoding_reqs else "alternating"] += 1
        self._steps["floor"] += chunk.floor_rules
        return chunk

    def report(self) -> dict[str, Any] | None:
        """The state for ``/server_info``; None without a bound."""
        if not self.active:
            return None
        last = self._last
        return {
            "target_ms": 1e3 * self.target,
            "margin": self.margin,
            "steps": dict(self._steps),
            "last": None
            if last is None
            else {
                "tokens": last.tokens,
                "room": last.room,
                "predicted_ms": 1e3 * last.predicted,
                "budget_ms": 1e3 * last.budget,
                "decodes": last.decodes.requests,
            },
        }

    def defers_prompts(self, running: ScheduleBatch) -> bool:
        """Whether the next step must be a decode step, because the last step had prompts and no decodes."""
        due, self._decode_is_due = self._decode_is_due, False
        return self.active and due and not running.is_empty() and not running.is_prefill_only
