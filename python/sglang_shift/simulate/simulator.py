"""Simulates the scheduler's steps, with the real policies and without a model. The cost model drives the clock.

The simulator shows how a policy would perform on some traffic, if steps took the times that the cost model predicts.
It makes batches as SGLang makes them: in the order of arrival, and prompts first. With a bound on the gap between
tokens, it makes them as our scheduler does. It leaves out

- the radix cache,
- requests that are retracted: a request reserves KV cache for its whole output when it is admitted, as with
  ``ignore_eos``,
- the time between steps, because SGLang overlaps it,
- everything outside the scheduler.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from statistics import fmean

import numpy as np

from sglang_shift.cost.chunk_budget import ChunkBudget, Decodes, Prompts
from sglang_shift.cost.chunk_share import ChunkShare
from sglang_shift.cost.model import CostModel
from sglang_shift.modes import MODES, PENDING_REQUESTS, Mode, ShiftPolicy, StepState
from sglang_shift.simulate.traffic import Request

Observer = Callable[[StepState, Mode, float], None]
"""Called with each step, its mode and its seconds, before the next step is chosen."""


@dataclass(frozen=True)
class Server:
    """The limits of the batches.

    Attributes:
        chunk: Prompt tokens that one step computes at most (``--chunked-prefill-size``).
        pool: Tokens that the KV pool holds (``--max-total-tokens``).
        max_running: Requests that hold KV cache at most (``--max-running-requests``).
        mixed: Whether prefill steps also decode the running requests. Each of these requests adds a token, which counts
            towards the chunk (``--enable-mixed-chunk``).
        interval: Decode steps after each step of prompts that decodes no requests (``--prefill-decode-interval``).
        budget: The bound on the gap between tokens, with the costs that the scheduler knows; None for no bound. With a
            bound, and without ``mixed``, a decode step follows each step of prompts if requests decode.
        buckets: By mode, ascending batch sizes of the CUDA graphs of decode steps. Without an entry, a mode runs
            eagerly.
    """

    chunk: int = 8192
    pool: int = 400_000
    max_running: int = 1024
    mixed: bool = False
    interval: int = 0
    budget: ChunkBudget | None = None
    buckets: Mapping[Mode, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.max_running < 1:
            raise ValueError("a server needs a chunk of at least a token and room for a running request")
        if self.mixed and self.chunk <= self.max_running:
            raise ValueError("mixed steps need a chunk of more tokens than requests run at most")

    def padded(self, tokens: int) -> dict[Mode, int]:
        """Return, by mode, the size of the graph that a decode step of ``tokens`` replays.

        A mode has no entry if its largest graph is too small.
        """
        return {
            mode: sizes[i] for mode, sizes in self.buckets.items() if (i := bisect_left(sizes, tokens)) < len(sizes)
        }


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """A served request. Times are in seconds.

    Attributes:
        request: The request.
        ttft: Time from its arrival to its first token.
        tpot: Time per token after the first token; None if there is only one token.
        e2e: Time from its arrival to its last token.
    """

    request: Request
    ttft: float
    tpot: float | None
    e2e: float

    @property
    def end(self) -> float:
        """When the last token came."""
        return self.request.time + self.e2e


@dataclass(frozen=True)
class Result:
    """The result of a simulation.

    Attributes:
        served: All requests, in the order of their arrival.
        steps: Number of steps, by mode.
        tokens: Computed tokens, by mode: every prompt token, and every output token except the first of each request.
            The first output token comes with the prompt.
        switches: Changes of mode.
        makespan: Seconds from the first arrival to the last token.
        step_seconds: Seconds of the makespan in which a step ran.
        gaps: Times between two tokens of a request, each with the number of times that it occurred.
    """

    served: list[ServedRequest]
    steps: dict[Mode, int]
    tokens: dict[Mode, int]
    switches: int
    makespan: float
    step_seconds: float
    gaps: list[tuple[float, int]] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Prompt and output tokens per second of the makespan."""
        return sum(s.request.prompt + s.request.output for s in self.served) / self.makespan

    def metrics(self) -> dict[str, float]:
        """Return means over the requests and other figures: seconds, tokens per second, counts.

        The mean TPOT is over the requests with more than one output token. It is 0 if there are none.
        """
        e2e = [s.e2e for s in self.served]
        seconds, counts = zip(*sorted(self.gaps), strict=True) if self.gaps else ((0.0,), (1,))
        below = list(accumulate(counts))
        return {
            "mean_ttft": fmean(s.ttft for s in self.served),
            "mean_tpot": fmean([s.tpot for s in self.served if s.tpot is not None] or [0.0]),
            "throughput": self.throughput,
            "mean_e2e": fmean(e2e),
            "p99_e2e": float(np.percentile(e2e, 99, method="inverted_cdf")),
            "p99_ttft": float(np.percentile([s.ttft for s in self.served], 99, method="inverted_cdf")),
            "mean_gap": sum(gap * n for gap, n in self.gaps) / below[-1],
            "p99_gap": seconds[bisect_left(below, 0.99 * below[-1])],
            "max_gap": seconds[-1],
            "switches": float(self.switches),
            "makespan": self.makespan,
            "busy": self.step_seconds,
        }


def simulate(
    requests: Sequence[Request],
    policy: ShiftPolicy,
    true_costs: CostModel,
    server: Server | None = None,
    observe: Observer | None = None,
) -> Result:
    """Simulate a server that gets ``requests``.

    Args:
        requests: At least one request, in any order.
        policy: The policy. It is asked for the mode of every step, as by the real scheduler.
        true_costs: Gives the real time of a step. The policy's own cost model may differ from it.
        server: Limits of the batches; None for :class:`Server`'s defaults.
        observe: Called after each step.

    Raises:
        ValueError: there are no requests, or the KV pool cannot hold one of them.
    """
    return _Simulation(requests, policy, true_costs, server or Server()).run(observe)


@dataclass(slots=True)
class _Step:
    """A step that is about to run: its state, the prompts that it finishes, and whether it decodes."""

    state: StepState
    finished_prompts: list[int] = field(default_factory=list)
    decodes: bool = False


class _Simulation:
    """The state of the server. A request is known by its index in the order of arrival.

    Requests are admitted in this order, so the waiting requests are ``next_index`` to ``arrived_count``. Those that a
    bound lets pass others are an exception, and are in ``ahead``. Sums describe the decoding requests, so a decode step
    is simulated equally fast for any number of requests.
    """

    def __init__(self, requests: Sequence[Request], policy: ShiftPolicy, true_costs: CostModel, server: Server) -> None:
        if not requests:
            raise ValueError("there are no requests to serve")
        if any(r.prompt + r.output > server.pool for r in requests):
            raise ValueError(f"a request has more tokens than the KV pool holds ({server.pool})")
        self.requests = sorted(requests, key=lambda r: r.time)
        self.policy, self.true_costs, self.server = policy, true_costs, server
        self.prompts = [0, *accumulate(r.prompt for r in self.requests)]
        self.clock = self.requests[0].time
        self.arrived_count = self.next_index = 0
        self.free = server.pool
        self.chunked: int | None = None  # the admitted request whose prompt is not finished
        self.chunked_done = 0  # tokens of this prompt that are finished
        self.running = 0
        self.kv_reads = 0  # sum of the sequence lengths in the next decode step
        self.decoded = 0  # decode steps so far
        self.ends: dict[int, list[int]] = {}  # requests by their last decode step
        self.first = [0.0] * len(self.requests)
        self.end = [0.0] * len(self.requests)
        self.unserved = len(self.requests)
        self.ahead: set[int] = set()  # admitted requests that arrived after a request that waits
        self.share = ChunkShare()
        self.decode_steps_due = 0
        self.last_decode = 0.0
        self.first_tokens: list[float] = []  # times of the first tokens since the last decode step
        self.gaps: list[tuple[float, int]] = []
        self.mode: Mode | None = None
        self.since_switch = 0

    def run(self, observe: Observer | None) -> Result:
        """Run steps until all requests are served."""
        steps, tokens, switches, step_seconds = dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0), 0, 0.0
        choose, predict = self.policy.choose, self.true_costs.predict
        while self.unserved:
            self._arrive()
            step = self._next_step()
            mode = choose(step.state)
            seconds = predict(mode, step.state)
            self.since_switch += 1
            if self.mode not in (None, mode):
                switches += 1
                seconds += self.true_costs.switch_seconds
                self.since_switch = 0  # the real selector counts in the same way
            self.mode = mode
            self.clock += seconds
            step_seconds += seconds
            steps[mode] += 1
            tokens[mode] += step.state.num_tokens
            if step.decodes:
                self._finish_decode()
            for i in step.finished_prompts:
                self._finish_prompt(i)
            if observe is not None:
                observe(step.state, mode, seconds)
        served = [self._served_request(i, r) for i, r in enumerate(self.requests)]
        return Result(served, steps, tokens, switches, self.clock - self.requests[0].time, step_seconds, self.gaps)

    def _served_request(self, i: int, r: Request) -> ServedRequest:
        tpot = (self.end[i] - self.first[i]) / (r.output - 1) if r.output > 1 else None
        return ServedRequest(r, self.first[i] - r.time, tpot, self.end[i] - r.time)

    def _arrive(self) -> None:
        """Queue the requests that have arrived. If there is nothing to do, move the clock to the next arrival."""
        requests = self.requests
        if not self.running and self.chunked is None and not self._waiting_count:
            self.clock = max(self.clock, requests[self.arrived_count].time)
        while self.arrived_count < len(requests) and requests[self.arrived_count].time <= self.clock:
            self.arrived_count += 1

    @property
    def _waiting_count(self) -> int:
        return self.arrived_count - self.next_index - len(self.ahead)

    def _waiting(self) -> Iterator[int]:
        """Yield the requests that wait."""
        return (i for i in range(self.next_index, self.arrived_count) if i not in self.ahead)

    def _next_step(self) -> _Step:
        """Make the next step. It computes prompts if any can run, and only decodes otherwise."""
        due = self.decode_steps_due and self.running
        self.decode_steps_due = max(0, self.decode_steps_due - 1)
        if not due and (self.chunked is not None or self._waiting_count):
            finished, prompts = self._fill_chunk()
            if prompts.tokens:
                if not (self.server.mixed and self.running):
                    bounded = self.server.budget is not None and self.running > 0
                    self.decode_steps_due = max(self.server.interval, int(bounded))
                    return _Step(self._state(prompts.tokens, prompts.tokens, {}, prompts.kv_reads), finished)
                tokens = prompts.tokens + self.running
                state = self._state(tokens, prompts.tokens, {}, prompts.kv_reads + self.kv_reads)
                return _Step(replace(state, decode_kv_reads=self.kv_reads), finished, True)
        running = self.running
        return _Step(self._state(running, 0, self.server.padded(running), self.kv_reads), decodes=True)

    def _fill_chunk(self) -> tuple[list[int], Prompts]:
        """Take up to a chunk of prompt tokens. Return the requests whose prompts they finish, and the tokens."""
        server = self.server
        chunk = server.chunk - (self.running if server.mixed else 0)
        finished: list[int] = []
        prompts = Prompts()
        if self.chunked is not None:
            i, done = self.chunked, self.chunked_done
            room, chosen = self._room(prompts, done, chunk), []
            if server.budget is not None:
                chosen = self._chosen(room)
                room -= sum(self.requests[j].prompt for j in chosen)
            now = min(self.requests[i].prompt - done, room)
            prompts = prompts.plus(done, now)
            self.chunked_done += now
            if self.chunked_done == self.requests[i].prompt:
                finished.append(i)
                self.chunked = None
                self.share.reset()
            else:
                self.share.continue_long(now, chunk)
                return self._take_beside(chosen, chunk, prompts)
        while (i := self.next_index) < self.arrived_count and self.running + len(finished) < server.max_running:
            r = self.requests[i]
            room = self._room(prompts, 0, chunk)
            if room <= 0 or not self._admit(i):
                break
            now = min(r.prompt, room)
            prompts = prompts.plus(0, now)
            if now == r.prompt:
                finished.append(i)
            else:
                self.chunked, self.chunked_done = i, now
                self.share.reset()
                self.share.continue_long(now, chunk)
                break
        return finished, prompts

    def _room(self, prompts: Prompts, history: int, chunk: int) -> int:
        """Return how many tokens of the next prompt fit the step."""
        most = chunk - prompts.tokens
        if self.server.budget is None:
            return most
        decodes = Decodes(self.running, self.kv_reads, mixed=self.server.mixed)
        return self.server.budget.room(prompts, history, most, decodes)

    def _chosen(self, room: int) -> list[int]:
        """Return the waiting requests that the step takes beside the prompt that continues."""
        waiting = list(islice(self._waiting(), PENDING_REQUESTS))
        return [waiting[k] for k in self.share.chosen(room, (self.requests[i].prompt for i in waiting))]

    def _take_beside(self, chosen: list[int], chunk: int, prompts: Prompts) -> tuple[list[int], Prompts]:
        """Take the chosen requests, beside the prompt that continues. The arguments and results are as above."""
        finished: list[int] = []
        self.share.take(sum(self.requests[i].prompt for i in chosen))
        for i in chosen:
            prompt = self.requests[i].prompt
            room = self._room(prompts, 0, chunk)
            if prompt > room or self.running + len(finished) >= self.server.max_running or not self._admit(i):
                break
            prompts = prompts.plus(0, prompt)
            finished.append(i)
        return finished, prompts

    def _admit(self, i: int) -> bool:
        """Reserve KV cache for a waiting request, and take it from the queue. Return whether there is room."""
        r = self.requests[i]
        if r.prompt + r.output > self.free:
            return False
        self.free -= r.prompt + r.output
        self.ahead.add(i)
        while self.next_index in self.ahead:
            self.ahead.remove(self.next_index)
            self.next_index += 1
        return True

    def _state(self, tokens: int, prompt_tokens: int, padded: dict[Mode, int], kv_reads: int) -> StepState:
        """Return the state that the policy sees, once the step's prompts have left the queue."""
        start, stop = self.next_index, self.arrived_count
        if self.ahead:
            pending = sum(self.requests[i].prompt for i in islice(self._waiting(), PENDING_REQUESTS))
        else:
            pending = self.prompts[min(start + PENDING_REQUESTS, stop)] - self.prompts[start]
        if self.chunked is not None:
            pending += self.requests[self.chunked].prompt - self.chunked_done
        return StepState(
            tokens,
            prompt_tokens,
            self.running,
            self._waiting_count,
            pending,
            padded,
            kv_reads,
            self.mode,
            self.since_switch,
        )

    def _finish_decode(self) -> None:
        self.gaps += [(self.clock - first, 1) for first in self.first_tokens]
        if older := self.running - len(self.first_tokens):
            self.gaps.append((self.clock - self.last_decode, older))
        self.last_decode = self.clock
        self.first_tokens = []
        self.decoded += 1
        self.kv_reads += self.running
        for i in self.ends.pop(self.decoded, ()):
            self.running -= 1
            self.kv_reads -= self.requests[i].prompt + self.requests[i].output
            self._finish(i)

    def _finish_prompt(self, i: int) -> None:
        r = self.requests[i]
        self.first[i] = self.clock
        if r.output == 1:
            self._finish(i)
            return
        self.running += 1
        self.first_tokens.append(self.clock)
        self.kv_reads += r.prompt + 1
        self.ends.setdefault(self.decoded + r.output - 1, []).append(i)

    def _finish(self, i: int) -> None:
        self.end[i] = self.clock
        self.free += self.requests[i].prompt + self.requests[i].output
        self.unserved -= 1
