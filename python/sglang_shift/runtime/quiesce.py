"""Takes all requests of a scheduler out of their batches, and keeps their KV cache among the cached prefixes.

Afterwards a scheduler is a queue of requests and a prefix cache. SGLang makes batches and all their tensors from the
queue again, as it does for requests that it has retracted because memory ran short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_shift.runtime.instance_queue import GOES_FIRST
from sglang_shift.seams import relies_on


@dataclass(frozen=True)
class Retracted:
    """A request that was taken out of its batch.

    Attributes:
        req: The request.
        computed: Its tokens whose keys and values were in the KV cache.
    """

    req: Req
    computed: int


@relies_on(
    "sglang.srt.managers.scheduler:Scheduler.event_loop_overlap",
    "With overlap scheduling, the result of one batch waits here while new requests are handled.",
)
@relies_on(
    "sglang.srt.managers.scheduler:Scheduler.process_pending_chunked_abort",
    "An abort of a prompt that is computed in chunks waits for the next step.",
)
def drain(scheduler: Any) -> None:
    """Process the results of all batches, send their tokens, and finish aborts and grammars that wait."""
    while scheduler.result_queue:
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
    scheduler.process_pending_chunked_abort()
    while scheduler.grammar_manager.has_waiting_grammars():
        for req in scheduler.grammar_manager.get_ready_grammar_requests():
            scheduler._add_request_to_queue(req)


@relies_on(
    "sglang.srt.managers.scheduler:Scheduler.pause_generation",
    "This method lists the requests that are in no queue: those that decode, those of the last prefill, and a chunk.",
)
def live_requests(scheduler: Any) -> list[Req]:
    """The requests in batches. Before :func:`drain`, some of them may end with their last step."""
    batches = [scheduler.running_batch]
    last, chunk = scheduler.last_batch, scheduler.chunked_req
    if last is not None and last.forward_mode.is_extend():
        batches.append(last)
    reqs = [req for batch in batches for req in batch.reqs] + ([] if chunk is None else [chunk])
    return [req for req in dict.fromkeys(reqs) if not req.finished()]


@relies_on(
    "sglang.srt.mem_cache.common:release_kv_cache",
    "This function caches the tokens of a request that has not finished, and frees what cannot be cached.",
)
@relies_on(
    "sglang.srt.managers.scheduler:Scheduler._poll_timeout_aborts",
    "With SGLANG_REQ_WAITING_TIMEOUT, this method aborts requests by the time when they came into the queue.",
)
@relies_on(
    "sglang.srt.managers.schedule_batch:Req.reset_for_retract",
    "This method resets what a request knows of its batch and of its place in the KV cache.",
)
def retract(scheduler: Any) -> list[Retracted]:
    """Put all live requests at the begin of the queue, and their KV cache among the cached prefixes."""
    retracted = []
    for req in live_requests(scheduler):
        computed = 0
        if req.kv.holds_kv:
            computed = req.owned_kv_len()
            release_kv_cache(req, scheduler.tree_cache, checkpoint=True)
        count = req.retraction_count
        req.reset_for_retract()
        req.retraction_count = count  # memory did not run short, and SGLang reports this number
        req.time_stats.set_wait_queue_entry_time()  # the seconds for which it ran are not waiting
        setattr(req, GOES_FIRST, True)
        skip_known_logprobs(req)
        retracted.append(Retracted(req, computed))
    scheduler.waiting_queue = [each.req for each in retracted] + scheduler.waiting_queue
    scheduler.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
    scheduler.last_batch = scheduler.chunked_req = None
    scheduler.req_to_token_pool.clear()
    return retracted


@relies_on(
    "sglang.srt.managers.schedule_batch:Req._compute_max_prefix_len",
    "If a request returns logprobs, this method lets it use cached tokens only before the first of them.",
)
def skip_known_logprobs(req: Req) -> None:
    """Let a request use its cached tokens, if the logprobs of its prompt are known."""
    if req.return_logprob and req.logprob.input_token_logprobs_val is not None:
        req.logprob_start_len = -1
