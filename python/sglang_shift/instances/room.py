"""Says how much KV cache an instance must have to serve a request, as SGLang decides it.

The controller sends requests by this rule, and the ranks give splits up by it. SGLang itself never says that a request
is too large for the cache: a request that it cannot admit waits for ever, and all requests behind it wait, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_shift.seams import relies_on

KEPT_OF_CONTEXT = 2
"""Tokens of the context that SGLang leaves free beside a request."""

KEPT_BESIDE_PROMPT = 7
"""Tokens of the KV cache that SGLang leaves free beside a prompt that it accepts."""


@relies_on(
    "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.max_new_tokens_for_memory",
    "This method limits the output of a request to what is free beside the pages of its prompt.",
)
@relies_on(
    "sglang.srt.mem_cache.prefill_budget:PrefillBudget.check_prefill",
    "This method admits a request if the cache has more tokens than the request needs.",
)
@relies_on(
    "sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
    "This method counts one page besides the tokens that a request needs.",
)
@relies_on(
    "sglang.srt.managers.scheduler:Scheduler.init_req_max_new_tokens",
    "This method cuts the limit of the output to what the context leaves.",
)
@dataclass(frozen=True)
class RoomRule:
    """The rule of one server.

    Attributes:
        page_size: Tokens in a page of the KV cache.
        context: The most tokens of a request, prompt and output, that the model can serve.
    """

    page_size: int
    context: int

    @property
    def kept(self) -> int:
        """Tokens that SGLang leaves free beside the pages of a prompt and the tokens of its output."""
        return self.page_size + 1

    def room(self, prompt: int, output: int) -> int:
        """The tokens of the smallest KV cache in which SGLang computes a prompt and all tokens of its output."""
        pages = -(-prompt // self.page_size) * self.page_size
        return max(pages + output + self.kept, prompt + KEPT_BESIDE_PROMPT)

    def need(self, prompt: int, output: int | None, largest: int, generated: int = 0) -> int:
        """The tokens that the KV cache of an instance must have for a request.

        A request without a limit, or with one that no instance could serve, gets as many tokens as its instance has
        room for. So only the tokens that it has must fit, and one more. Like SGLang, the rule first cuts a limit to
        what the context leaves.

        Args:
            prompt: The tokens of its prompt.
            output: The tokens that it may generate; None if it has no limit.
            largest: The tokens of the largest KV cache that it could get.
            generated: The tokens that it has generated so far.
        """
        reachable = min(output or 0, self.context - prompt - KEPT_OF_CONTEXT)
        if reachable > generated and (whole := self.room(prompt, reachable)) <= largest:
            return whole
        return self.room(prompt, generated + 1)

    def longest_prompt(self, tokens: int) -> int:
        """The tokens of the longest prompt that a KV cache of so many tokens admits. It leaves room for one token."""
        return tokens - self.page_size - 1
