"""Sends a workload and times the answers, with the request functions of SGLang's ``bench_serving``.

This module defines the order of sending, and keeps a record of every request. It makes prompts of token ids, so that
lengths and shared prefixes are exact.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import requests
from msgspec.structs import replace

from sglang_shift.simulate.traffic import Request
from sglang_shift.tools.benchmark.records import RequestRecord
from sglang_shift.tools.benchmark.workloads import Workload, prompt_ids
from sglang_shift.tools.servers import call

# bench_serving reads these arguments of its own command line while it sends.
BENCH_SERVING = argparse.Namespace(
    temperature=0.0, top_p=1.0, disable_ignore_eos=False, disable_stream=False, return_logprob=False,
    return_routed_experts=False, logprob_start_len=-1, top_logprobs_num=0, token_ids_logprob=None,
    cache_report=True, header=None,
)  # fmt: skip
# bench_serving ignores a token without text. A special token has no text unless the server is told to keep it.
ALL_TOKENS = {"skip_special_tokens": False}
NO_ANSWER = "the answer has no token, or is not for the whole prompt"
BAD_REQUEST = 400


class Client:
    """Sends workloads to one server.

    Args:
        url: The server's address.
        api: ``sglang`` uses ``/generate``; ``openai`` uses ``/v1/completions``.
        model: Name of the model, for OpenAI's API.
        vocabulary: Token ids of prompts are less than this number.
        timeout: Seconds that a workload may take.

    Attributes:
        native: Whether the client uses SGLang's own API.
    """

    def __init__(self, url: str, api: str, model: str, vocabulary: int, timeout: float) -> None:
        from sglang.benchmark import serving

        serving.set_global_args(BENCH_SERVING)
        self.vocabulary, self.timeout, self.model = vocabulary, timeout, model
        self._request = serving.RequestFuncInput
        self._send: Any = {
            "sglang": serving.async_request_sglang_generate,
            "openai": serving.async_request_openai_completions,
        }[api]
        self._server = url
        self._url = url + {"sglang": "/generate", "openai": "/v1/completions"}[api]
        self.native = api == "sglang"

    def run(self, workload: Workload, seed: int, done: Callable[[], object] = lambda: None) -> list[RequestRecord]:
        """Send all requests and wait for their answers.

        Args:
            workload: What to send.
            seed: The seed of the prompts' tokens, together with the workload's name. So no workload finds its prompts
                in a prefix cache that cannot be emptied.
            done: Called each time a request has ended.

        Returns:
            A record of each request that was sent, in the workload's order. If a request was refused or did not end in
            time, its record has an error.
        """
        # The prompts are made beforehand. This takes time, and requests must be sent on time.
        words = f"{workload.name} {seed}"
        prompts = [prompt_ids(r, i, words, self.vocabulary) for i, r in enumerate(workload.requests)]
        records = asyncio.run(self._run(workload, prompts, done))
        if any(record.unfinished for record in records.values()):
            self._abort_all()
        return [
            replace(self._refused(record, prompts[i], workload.requests[i].output), group=workload.group_of(i))
            for i, record in sorted(records.items())
        ]

    async def _run(
        self, workload: Workload, prompts: list[list[int]], done: Callable[[], object]
    ) -> dict[int, RequestRecord]:
        started = time.perf_counter()
        limit = asyncio.Semaphore(workload.concurrency) if workload.concurrency else contextlib.nullcontext()
        records: dict[int, RequestRecord] = {}

        async def one(number: int) -> None:
            request = workload.requests[number]
            await asyncio.sleep(started + request.time - time.perf_counter())
            async with limit:
                records[number] = unfinished_record(request, time.perf_counter() - started)
                records[number] = await self._one(prompts[number], request, started)
            done()

        tasks = [asyncio.create_task(one(i)) for i in range(len(prompts))]
        ended, late = await asyncio.wait(tasks, timeout=workload.stop)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in ended:
            task.result()  # it raises what the task raised
        return records

    def _abort_all(self) -> None:
        """End all requests on the server, because nobody waits for them."""
        if self.native:
            with contextlib.suppress(OSError):
                call(self._server + "/abort_request", {"abort_all": True}, text=True)

    def _refused(self, record: RequestRecord, ids: list[int], output: int) -> RequestRecord:
        """Return the record. If the server refuses the request, the record says so.

        If SGLang refuses a request, it streams an answer to a prompt of one token, and ``bench_serving`` does not say
        why. So the request is sent again, without a stream, after all others. Then the answer has the status. A server
        that refuses a request answers at once.
        """
        if record.error != NO_ANSWER:
            return record
        try:
            call(self._url, self._body(ids, output), timeout=self.timeout)
        except requests.HTTPError as error:
            if error.response.status_code == BAD_REQUEST:
                return replace(record, error=f"rejected: {error.response.text.strip()}", rejected=True)
        except OSError:
            pass
        return record

    def _body(self, ids: list[int], output: int) -> dict[str, Any]:
        if self.native:
            return {"input_ids": ids, "sampling_params": {"max_new_tokens": output}}
        return {"model": self.model, "prompt": ids, "max_tokens": output}

    async def _one(self, ids: list[int], asked: Request, started: float) -> RequestRecord:
        output, due = asked.output, asked.time
        if self.native:
            sampling = {"temperature": 0.0, "max_new_tokens": output, "ignore_eos": True, **ALL_TOKENS}
            extra: dict[str, Any] = {"sampling_params": sampling}
        else:
            extra = dict(ALL_TOKENS)
        request = self._request(ids, self._url, len(ids), output, self.model, "", None, extra)
        sent = time.perf_counter() - started
        try:
            answer = await asyncio.wait_for(self._send(request), max(0.0, self.timeout - sent))
        except TimeoutError:
            return failed_record(due, f"not answered {self.timeout:.0f} s after the workload's start (--timeout)")
        if not answer.success:
            error = answer.error.strip().rpartition("\n")[2] or "no answer"
            return failed_record(due, error, rejected=error.startswith("Bad Request:"))
        if not answer.ttft or answer.prompt_len < len(ids):
            return failed_record(due, NO_ANSWER)
        if answer.output_len != output:
            return failed_record(due, f"{answer.output_len} tokens came instead of {output}")
        ttft, latency, *itl = (round(t, 6) for t in (answer.ttft, answer.latency, *answer.itl))
        sent = round(answer.start_time - started, 6)
        gaps = deliveries(answer.itl)
        return RequestRecord(
            due, sent, ttft, latency, itl, answer.prompt_len, answer.output_len, answer.cached_tokens,
            deliveries=gaps if len(gaps) < len(itl) else [],
        )  # fmt: skip


def deliveries(itl: Sequence[float]) -> list[float]:
    """Return the times between deliveries of tokens, from ``bench_serving``'s times between tokens.

    ``bench_serving`` divides the time of a delivery by its number of tokens, and repeats the quotient, one and the same
    object, for each token. So the sum over equal objects is the time of the delivery.
    """
    return [round(sum(group), 6) for group in (list(same) for _, same in groupby(itl, key=id))]


def failed_record(due: float, error: str, rejected: bool = False) -> RequestRecord:
    """Return the record of a request without an answer."""
    return RequestRecord(due, due, 0.0, 0.0, [], 0, 0, error=error, rejected=rejected)


def unfinished_record(request: Request, sent: float) -> RequestRecord:
    """Return the record of a request that is sent and not answered when its workload ends."""
    return RequestRecord(
        request.time, round(sent, 6), 0.0, 0.0, [], 0, 0, error="not answered when the workload ended", unfinished=True
    )


def errors(records: list[RequestRecord]) -> Iterator[str]:
    """Return the errors of the requests that failed, each error once."""
    return iter(dict.fromkeys(r.error for r in records if r.failed))
