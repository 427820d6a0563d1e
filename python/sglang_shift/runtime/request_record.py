"""What travels of a request when its instance merges with others: the request itself, and what was computed of it.

A rank that does not have the request makes it again through SGLang's own handler, with all its checks. Then it sets
what the other rank has computed. The KV cache travels on its own.
"""

from __future__ import annotations

import copy
from array import array
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req

from sglang_shift.runtime.instance_queue import GOES_FIRST
from sglang_shift.seams import relies_on

STATE = (
    "logprob", "logprob_start_len", "return_logprob", "input_logprob_sent",
    "surr_offset", "read_offset", "decoded_text", "surr_and_decode_ids", "cur_decode_ids_len",
    "send_token_offset", "send_decode_id_offset", "send_output_token_logprobs_offset",
    "is_retracted", "retracted_stain", "retraction_count", "priority", "to_finish", "arrival_processed_tokens",
    "cached_tokens", "cached_tokens_device", "_cache_breakdown_computed", "weight_version_events", "hidden_states",
    "_is_reasoning_over", "reasoning_tokens", "_think_end_match_len", "_think_start_match_len", "customized_info",
    "shift_steps", "shift_last_token", GOES_FIRST,
)  # fmt: skip
"""The attributes of SGLang's request that change while it runs, and that steps and answers depend on."""


@dataclass(frozen=True)
class RequestRecord:
    """A request, as it travels.

    Attributes:
        request: The request as the tokenizer manager sent it, with the prompt that SGLang runs.
        output: Its tokens so far.
        state: Its attributes of :data:`STATE`.
        constrained: Whether a grammar constrains its tokens.
        running: Whether some of it was computed, and not only queued.
        computed: Its tokens whose keys and values were in the KV cache.
        times: When it came, when its first step ran, and so on, by the clock of the machine.
    """

    request: TokenizedGenerateReqInput
    output: list[int]
    state: dict[str, Any]
    constrained: bool
    running: bool
    computed: int
    times: dict[str, float]

    @property
    def arrival(self) -> float:
        """When it came to a scheduler. The time when it came into the queue is a later one if it was retracted."""
        return self.times.get("scheduler_recv_time", 0.0)

    @property
    def rid(self) -> str:
        """The id of the request."""
        return str(self.request.rid)


def keep_request(req: Req, request: TokenizedGenerateReqInput) -> None:
    """Let SGLang's request remember what the tokenizer manager sent, because SGLang changes the latter.

    The limits of the output become smaller, if the instance is small. An instance that merges allows more again.
    """
    kept = copy.copy(request)
    kept.sampling_params = copy.copy(request.sampling_params)
    kept.time_stats = None
    req.shift_request = kept


def record(req: Req, *, running: bool, computed: int) -> RequestRecord:
    """Record a request that is in no batch."""
    request = copy.copy(req.shift_request)
    request.input_ids = req.origin_input_ids  # a long prompt may have been cut, or replaced when it was aborted
    return RequestRecord(
        request=request,
        output=list(req.output_ids),
        state={name: getattr(req, name) for name in STATE if hasattr(req, name)},
        constrained=req.grammar is not None,
        running=running,
        computed=computed,
        times={name: value for name, value in vars(req.time_stats).items() if type(value) is float},
    )


@relies_on(
    "sglang.srt.managers.schedule_batch:Req.__init__",
    "This method has the state of a request. What changes while it runs must travel.",
)
@relies_on(
    "sglang.srt.managers.schedule_batch:Req.init_incremental_detokenize",
    "This method keeps which tokens were sent to the detokenizer, and as which text.",
)
def restore(req: Req, record: RequestRecord) -> None:
    """Set what was computed of a request that was made again from its record."""
    req.output_ids = array("q", record.output)
    for name, value in record.state.items():
        setattr(req, name, value)


def restore_times(req: Req, record: RequestRecord) -> None:
    """Set when the steps of a request ran. Ranks order their queues by these times, so all have those of one rank."""
    for name, value in record.times.items():
        setattr(req.time_stats, name, value)


@relies_on(
    "sglang.srt.constrained.grammar_manager:GrammarManager.get_ready_grammar_requests",
    "This method takes a compiled grammar, and keeps a copy of it for requests with the same one.",
)
def restore_grammar(req: Req, record: RequestRecord, manager: Any) -> None:
    """Bring the grammar of a request to the state after its tokens so far.

    Args:
        req: The request. Its grammar may still be compiled: then this function waits for it.
        record: Its record.
        manager: SGLang's grammar manager.

    Raises:
        RuntimeError: the grammar does not compile here, although it did on another rank.
    """
    if not record.constrained:
        req.grammar = None  # an aborted request has none
        return
    if isinstance(req.grammar, Future):
        req.grammar = req.grammar.result()
        manager.grammar_backend.set_cache(req.grammar_key, req.grammar.copy())
        manager._apply_request_reasoning_config(req)
    if not hasattr(req.grammar, "accept_token"):
        raise RuntimeError(f"the grammar of request {record.rid} does not compile on every rank")
    _read_tokens(req, record.output)


@relies_on(
    "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor._accept_grammar_tokens",
    "This method aborts a request whose grammar rejects a token. The request ends with its next step.",
)
def _read_tokens(req: Req, tokens: list[int]) -> None:
    """Let the grammar of a request read its tokens, up to one that it rejects if SGLang aborts the request for it."""
    try:
        for token in tokens:
            req.grammar.accept_token(token)
    except ValueError:
        if req.to_finish is None:
            raise


REASONS_TO_STAY: dict[str, tuple[str, ...]] = {
    "brings its own embeddings, which SGLang does not continue": ("input_embeds", "positional_embed_overrides"),
    "has images, sound or videos": ("multimodal_inputs",),
    "belongs to a session": ("session",),
    "has an adapter": ("lora_id",),
    "is a beam search": ("beam_group",),
    "returns masks of sampling": ("sampling_mask_rows",),
}
"""The attributes with which a request cannot travel, and why."""


@relies_on(
    "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor._append_prefill_hidden_states",
    "A second prefill of a request adds its states as one more entry, beside those of the tokens so far.",
)
def reason_to_stay(req: Req) -> str | None:
    """Why a request cannot travel, in words; None if it can."""
    if req.return_hidden_states:  # also if it has no token yet, because the result of its step may be on the way
        return "returns hidden states, which SGLang does not continue"
    for reason, names in REASONS_TO_STAY.items():
        if any(getattr(req, name) is not None for name in names):
            return reason
    return None
