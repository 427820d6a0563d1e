"""Fills a step with the prompt tokens that fit a bound on the gap between tokens.

SGLang's adder counts tokens. Before each prompt, ours sets how many tokens are left: those that still fit the budget
after the prompt's history in the KV cache. SGLang has just looked up this history, so cached prefixes count exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.common import match_kv_cache

from sglang_shift.cost.chunk_budget import ChunkBudget, Decodes, Prompts
from sglang_shift.cost.chunk_share import ChunkShare
from sglang_shift.modes import PENDING_REQUESTS, Mode
from sglang_shift.seams import overrides, relies_on

TP_ONLY = (Mode.TP,)

LOOKED_UP = "shift_looked_up"
"""The attribute of a request whose cached prefix was looked up while it waited."""


@dataclass(frozen=True)
class _Plan:
    """How the step would run with one more prompt.

    Attributes:
        budget: The budget of the step.
        decodes: The requests that decode meanwhile.
        room: Tokens that the prompt may take.
        chunk: Tokens that SGLang has left.
    """

    budget: ChunkBudget
    decodes: Decodes
    room: int
    chunk: int


class ShiftPrefillAdder(PrefillAdder):
    """SGLang's adder with a budget of time. Call :meth:`start` before anything else.

    Attributes:
        budget: The budget of the step. Its only mode is TP once the step has a prompt that needs TP.
        decodes: The requests that decode meanwhile. They do not share the step once it has a prompt that cannot.
        prompts: The prompt tokens that the step has so far.
        room: Prompt tokens that the step can take. Each prompt that is added may change it, because its history counts.
        continues: Whether a prompt from the step before is not at its end.
    """

    budget: ChunkBudget
    decodes: Decodes
    prompts: Prompts
    room: int
    continues: bool

    def start(
        self,
        budget: ChunkBudget,
        decodes: Decodes,
        share: ChunkShare,
        waiting: Sequence[Req],
        needs_tp: Callable[[Req], bool],
        adapter_fits: Callable[[Req, set[str | None]], bool],
    ) -> None:
        """Begin an empty step.

        Args:
            budget: The budget of the step.
            decodes: The requests that decode meanwhile.
            share: How waiting prompts and a long prompt share steps.
            waiting: The queue.
            needs_tp: Whether a step with this prompt must run in TP.
            adapter_fits: Whether a step with these adapters can run this prompt.
        """
        self.budget, self.decodes, self.share, self.waiting = budget, decodes, share, waiting
        self.needs_tp, self.adapter_fits = needs_tp, adapter_fits
        self.prompts, self.room = Prompts(), 0
        self.continues = False
        self.chosen: set[str] = set()

    @overrides(
        "Our method limits the prompt that continues to the budget, to its share of the step and to the free KV cache. "
        "It reserves the KV cache for the rest of this prompt."
    )
    def add_chunked_req(self, req: Req) -> Req | None:
        """Add the next chunk of a prompt. Return the prompt if it is not at its end.

        Requests that decode may outgrow what SGLang expects. If they leave no page, a decode step follows, which
        retracts some of them. SGLang would take a chunk that does not fit.
        """
        free = int(self.memory_budget.remaining_current)
        if free < self.page_size and self.running_batch.reqs:
            self.continues = True
            return req
        plan = self._plan(req, req.prefix_len)
        beside = self._choose(req, plan.room)
        self.chunked_req_limit = max(1, min(plan.room - beside, free) // self.page_size) * self.page_size
        self.rem_chunk_tokens = plan.room
        rest: Req | None = super().add_chunked_req(req)
        tokens = self._record(req, plan)
        self.continues = rest is not None
        if rest is None:
            self.share.reset()
        else:
            self.share.continue_long(tokens, plan.chunk)
            self.share.take(beside)
            self._reserve_rest(req, tokens, plan.room)
        return rest

    @relies_on(
        "sglang.srt.mem_cache.prefill_budget:PrefillBudget.reserve",
        "This method counts tokens, an output and a page as taken, for all prompts that are added later.",
    )
    def _reserve_rest(self, req: Req, tokens: int, limit: int) -> None:
        """Reserve the KV cache that a prompt and its output still need, after ``tokens`` of it in this step.

        SGLang adds no prompt before this one ends, so it reserves only the chunk. Ours may add some, and they must
        leave what SGLang admitted this prompt for. The rest comes in chunks of up to ``limit`` tokens.
        """
        rest = len(req.full_untruncated_fill_ids) - req.prefix_len - tokens
        output = self._swa_new_tokens(req)
        self.memory_budget.reserve(rest, output, chunk_limit=limit, is_chunked_continuation=True)

    def _choose(self, long: Req, room: int) -> int:
        """Choose the waiting prompts that share the step with a prompt that continues. Return the tokens for them."""
        waiting = self._candidates(long)
        needs = [self.ceil_paged_tokens(self._uncached_tokens(req)) for req in waiting]
        chosen = self.share.chosen(room, needs, self.page_size)
        if self.prefill_max_requests is not None:
            chosen = chosen[: self.prefill_max_requests - 1]  # the prompt that continues counts
        self.chosen = {waiting[i].rid for i in chosen}
        return sum(needs[i] for i in chosen)

    @relies_on(
        "sglang.srt.managers.scheduler:Scheduler.can_schedule_lora_req",
        "SGLang passes over a waiting prompt if this method says no, with the adapters of the prompts before it.",
    )
    def _candidates(self, long: Req) -> list[Req]:
        """The waiting prompts that SGLang offers to a step with a prompt that continues."""
        if self.running_batch.batch_is_full:
            return []
        adapters = {req.lora_id for req in (*self.running_batch.reqs, long) if not req.finished()}
        found = []
        for req in islice(self.waiting, PENDING_REQUESTS):
            if self.adapter_fits(req, adapters):
                adapters.add(req.lora_id)
                found.append(req)
        return found

    @relies_on(
        "sglang.srt.mem_cache.common:match_kv_cache",
        "This function notes how many tokens of a waiting prompt are cached, and locks nothing.",
    )
    def _cached_tokens(self, req: Req) -> int:
        """Tokens of a waiting prompt that are cached, by the last look-up.

        SGLang looks a prompt up when it adds it, and some of its queue policies do so earlier. So we look once.
        """
        if not hasattr(req, LOOKED_UP):
            setattr(req, LOOKED_UP, True)
            if not req.num_matched_prefix_tokens:
                match_kv_cache(req, self.tree_cache)
        cached: int = req.num_matched_prefix_tokens
        return cached

    def _uncached_tokens(self, req: Req) -> int:
        return max(1, len(req.origin_input_ids) + len(req.output_ids) - self._cached_tokens(req))

    @overrides(
        "Our method limits a new prompt to the budget. Beside a prompt that continues, it adds only chosen ones."
    )
    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> Any:
        """Add a prompt to the step, if it fits. The result says whether SGLang tries the next prompt."""
        if self.new_chunked_req is not None:  # only one prompt can continue in the next step
            return AddReqResult.OTHER
        if has_chunked_req and req.rid not in self.chosen:
            return AddReqResult.CONTINUE if self.chosen else AddReqResult.OTHER
        self.chosen.discard(req.rid)
        plan = self._plan(req, req.prefix_len + req.host_hit_length)
        needed = self.ceil_paged_tokens(len(req.full_untruncated_fill_ids) - req.prefix_len - req.host_hit_length)
        if plan.room <= 0 or (has_chunked_req and needed > plan.room):
            return AddReqResult.OTHER
        self.rem_chunk_tokens = plan.room
        result = super().add_one_req(req, has_chunked_req, truncation_align_size)
        tokens = self._record(req, plan)
        if not has_chunked_req and self.new_chunked_req is req:
            self.share.reset()
            self.share.continue_long(tokens, plan.chunk)
        return result

    @overrides("Our method preempts no request for a prompt that the step does not take, for lack of room.")
    def preempt_to_schedule(self, req: Req) -> bool:
        """Preempt requests for a waiting prompt. SGLang asks before it looks the prompt up and adds it."""
        if self.new_chunked_req is not None:
            return False
        takes = req.rid in self.chosen if self.continues else self._plan(req, self._cached_tokens(req)).room > 0
        return takes and bool(super().preempt_to_schedule(req))

    @overrides("Our method takes no part of a prompt beside a prompt that continues, because only one can continue.")
    def _select_prefill_admission(self, req: Req, *, has_chunked_req: bool = False, **limits: Any) -> Any:
        """Select what a step takes of a prompt.

        Our adder only asks for prompts that fit whole. But they get longer if host memory turns out not to have their
        prefix, and the cache of sliding windows may bound what SGLang takes.
        """
        admission = super()._select_prefill_admission(req, has_chunked_req=has_chunked_req, **limits)
        is_part = not isinstance(admission, AddReqResult) and admission.is_chunked
        return AddReqResult.OTHER if has_chunked_req and is_part else admission

    def _plan(self, req: Req, history: int) -> _Plan:
        budget, decodes, chunk = self.budget, self.decodes, self.rem_chunk_tokens
        assert chunk is not None  # a target is refused without chunks
        if decodes.mixed and not shares_step(req):
            decodes = replace(decodes, mixed=False)
        if budget.modes != TP_ONLY and self.needs_tp(req):
            budget = replace(budget, modes=TP_ONLY)
        return _Plan(budget, decodes, budget.room(self.prompts, history, max(0, chunk), decodes), chunk)

    def _record(self, req: Req, plan: _Plan) -> int:
        """Record the prompt if SGLang has added it. Return its tokens, and give the rest of the chunk back."""
        assert self.rem_chunk_tokens is not None
        self.rem_chunk_tokens += plan.chunk - plan.room
        if not self.can_run_list or self.can_run_list[-1] is not req:
            return 0
        self.room = max(self.room, self.prompts.tokens + plan.room)
        self.budget, self.decodes = plan.budget, plan.decodes
        self.prompts = self.prompts.plus(req.prefix_len, req.extend_len)
        tokens: int = req.extend_len
        return tokens


def forget_look_up(req: Req) -> None:
    """Forget how many tokens of a waiting prompt are cached, because it now waits for another KV cache."""
    vars(req).pop(LOOKED_UP, None)
    req.num_matched_prefix_tokens = 0


def shares_step(req: Req) -> bool:
    """Whether SGLang can decode other requests in a step with this prompt."""
    return not req.return_logprob and req.input_embeds is None
