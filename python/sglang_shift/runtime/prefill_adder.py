"""Fills a step with the prompt tokens that fit a bound on the gap between tokens.

SGLang's adder counts tokens. Before each prompt, ours sets how many tokens are left: those that still fit the budget
after the prompt's history in the KV cache. SGLang has just looked up this history, so cached prefixes count exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder, SchedulePolicy

from sglang_shift.cost.chunk_budget import ChunkBudget, Decodes, Prompts
from sglang_shift.cost.chunk_share import ChunkShare
from sglang_shift.seams import overrides


class ShiftPrefillAdder(PrefillAdder):
    """SGLang's adder with a budget of time. Call :meth:`start` before anything else.

    Attributes:
        budget: The budget of the step.
        decodes: The requests that decode meanwhile. They do not share the step once it has a prompt that cannot.
        prompts: The prompt tokens that the step has so far.
        first_room: Tokens that were left for the first prompt; None before it.
    """

    budget: ChunkBudget
    decodes: Decodes
    prompts: Prompts
    first_room: int | None

    def start(self, budget: ChunkBudget, decodes: Decodes, share: ChunkShare, waiting: Sequence[Req]) -> None:
        """Begin an empty step.

        Args:
            budget: The budget of the step.
            decodes: The requests that decode meanwhile.
            share: How waiting prompts and a long prompt share steps.
            waiting: The queue.
        """
        self.budget, self.decodes, self.share, self.waiting = budget, decodes, share, waiting
        self.prompts, self.first_room = Prompts(), None
        self.chosen: set[str] = set()

    @overrides("Our method limits the prompt that continues to the budget, and to its share of the step.")
    def add_chunked_req(self, req: Req) -> Req | None:
        decodes, room, chunk = self._room(req, req.prefix_len)
        needs = [self.ceil_paged_tokens(SchedulePolicy._shortest_prefill_work(other)) for other in self.waiting]
        chosen = self.share.chosen(room, needs, self.page_size)
        self.chosen = {self.waiting[i].rid for i in chosen}
        pages = (room - sum(needs[i] for i in chosen)) // self.page_size
        self.chunked_req_limit = max(1, pages) * self.page_size
        self.rem_chunk_tokens = room
        rest: Req | None = super().add_chunked_req(req)
        tokens = self._record(req, decodes, room, chunk)
        if rest is None:
            self.share.reset()
        else:
            self.share.continue_long(tokens, chunk)
        return rest

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
        decodes, room, chunk = self._room(req, req.prefix_len + req.host_hit_length)
        needed = self.ceil_paged_tokens(len(req.full_untruncated_fill_ids) - req.prefix_len - req.host_hit_length)
        if room <= 0 or (has_chunked_req and needed > room):
            return AddReqResult.OTHER
        self.rem_chunk_tokens = room
        result = super().add_one_req(req, has_chunked_req, truncation_align_size)
        tokens = self._record(req, decodes, room, chunk)
        if has_chunked_req:
            self.share.take(tokens)
        return result

    def _room(self, req: Req, history: int) -> tuple[Decodes, int, int]:
        """How the decodes run with this prompt, the tokens that it may take, and those that SGLang has left."""
        decodes, chunk = self.decodes, self.rem_chunk_tokens
        assert chunk is not None  # a target is refused without chunks
        if not can_mix(req):
            decodes = replace(decodes, mixed=False)
        return decodes, self.budget.room(self.prompts, history, max(0, chunk), decodes), chunk

    def _record(self, req: Req, decodes: Decodes, room: int, chunk: int) -> int:
        """Record the prompt if SGLang has added it. Return its tokens, and give the rest of the chunk back."""
        assert self.rem_chunk_tokens is not None
        self.rem_chunk_tokens += chunk - room
        if not self.can_run_list or self.can_run_list[-1] is not req:
            return 0
        if self.first_room is None:
            self.first_room = room
        self.decodes = decodes
        self.prompts = self.prompts.plus(req.prefix_len, req.extend_len)
        tokens: int = req.extend_len
        return tokens


def can_mix(req: Req) -> bool:
    """Whether SGLang can decode other requests in a step with this prompt."""
    return not req.return_logprob and req.input_embeds is None
