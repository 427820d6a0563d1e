"""Finds the layout, chunk and policy that serve some traffic best. The step simulator tries each candidate.

There are two rounds. The first round tries every layout with one chunk and one policy. The second round tries every
chunk and policy with the best layout. The best candidate has the lowest mean end-to-end time, which includes the queue,
the first token and all other tokens. If the traffic is more than any layout serves, this time only says how long the
traffic lasts. Then the best candidate has the highest peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from sglang_shift.cost.model import PHASES, CostModel
from sglang_shift.errors import ShiftError
from sglang_shift.flags import AUTO
from sglang_shift.models.token_shards import most_token_shards
from sglang_shift.modes import MODES, Mode, ShiftPolicy
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.policy.builtin import Calibrated, FixedMode, TokenThreshold
from sglang_shift.simulate.simulator import Result, Server, simulate
from sglang_shift.simulate.traffic import Request
from sglang_shift.tools.plan.hardware import Gpu
from sglang_shift.tools.plan.memory import Memory, memory
from sglang_shift.tools.plan.model import Model
from sglang_shift.tools.plan.step_time import StepTimes

CHUNK = 8192
"""SGLang's default for these GPUs."""

CHUNKS = (2048, 4096, CHUNK, 16384)
GROUPS = (1, 2, 4, 8)
"""Numbers of ranks of a replica for which there are figures."""

PEAK_REQUESTS = 2000
"""Number of requests that come at once, to measure the most that a candidate serves. Short traffic is repeated."""

RATIO_ERROR = 0.15
"""The average error of the ratio of two end-to-end times, compared with the paper's table: docs/cost-model.md."""


@dataclass(frozen=True)
class Candidate:
    """A way to serve.

    Attributes:
        layout: The layout of each replica.
        replicas: Number of replicas.
        chunk: ``--chunked-prefill-size``.
        policy: ``tp``, ``sp``, ``calibrated`` or ``tokens N``.
        token_shards: ``--dcp-size``.
    """

    layout: RankLayout
    replicas: int
    chunk: int = CHUNK
    policy: str = "tp"
    token_shards: int = 1

    @property
    def shifts(self) -> bool:
        """Whether its steps may run in different modes."""
        return self.policy not in MODES


@dataclass(frozen=True)
class Trial:
    """The simulation of a candidate.

    Attributes:
        candidate: The candidate.
        memory: The memory of one GPU.
        costs: Step times of a replica.
        metrics: The result of :meth:`Result.metrics`; empty if the KV cache is too small for the traffic.
        peak: Prompt and output tokens per second when all requests come at once; 0 if the KV cache is too small.
    """

    candidate: Candidate
    memory: Memory
    costs: CostModel
    metrics: dict[str, float]
    peak: float


@dataclass(frozen=True)
class Plan:
    """The result of a search.

    Attributes:
        best: The recommendation.
        layouts: Every layout with the default chunk, and with TP alone or the ``calibrated`` policy.
        settings: Chunks and policies of the best layout.
        gpus: Number of GPUs.
        kv_dtype: The dtype of the KV cache: ``bfloat16`` or ``fp8``.
        offered_load: Prompt and output tokens per second that the traffic brings; 0 if all requests come at once.
        overloaded: Whether the traffic is more than any layout serves.
    """

    best: Trial
    layouts: list[Trial]
    settings: list[Trial]
    gpus: int
    kv_dtype: str
    offered_load: float
    overloaded: bool

    @property
    def highest_peak(self) -> float:
        """The highest peak of the layouts."""
        return max(o.peak for o in self.layouts)

    @property
    def trials(self) -> dict[Candidate, Trial]:
        """All trials that served the traffic, each candidate once."""
        return {o.candidate: o for o in (*self.layouts, *self.settings) if o.metrics}

    @property
    def alternatives(self) -> dict[Candidate, float]:
        """Candidates that the cost model cannot tell from the best candidate, the nearest first.

        The value of each is how much worse it is predicted to be, relative to the best candidate.
        """
        best = cost(self.best, self.overloaded)
        worse = {candidate: cost(o, self.overloaded) / best - 1 for candidate, o in self.trials.items()}
        del worse[self.best.candidate]
        return {c: more for c, more in sorted(worse.items(), key=lambda item: item[1]) if more <= RATIO_ERROR}


def cost(trial: Trial, overloaded: bool) -> float:
    """Return what the search minimizes, in seconds: the mean end-to-end time, or the time per token at the peak."""
    return 1 / trial.peak if overloaded else trial.metrics["mean_e2e"]


def offered_load(requests: Sequence[Request]) -> float:
    """Return prompt and output tokens per second, from the first arrival to the last; 0 if all come at once."""
    times = [r.time for r in requests]
    seconds = max(times) - min(times)
    return sum(r.prompt + r.output for r in requests) / seconds if seconds else 0.0


def layouts(model: Model, gpus: int) -> Iterator[tuple[RankLayout, int]]:
    """Yield all (P, S) by which the model can be divided, with the most replicas that fit on the GPUs."""
    for ranks in GROUPS:
        if ranks > gpus:
            continue
        try:
            model.decoder.check(ranks)
        except ShiftError:
            continue
        for sp in GROUPS:
            if ranks % sp == 0:
                yield RankLayout(ranks, sp), gpus // ranks


def token_shards_of(model: Model, ranks: int, dcp_size: int | str) -> int:
    """Return D on P ranks: the number that was asked for, or the most with ``auto``. If it is not possible, 1.

    A server on GPUs divides neither latents nor the caches of layers with a window.
    """
    if model.decoder.latent or model.other_layers:
        return 1
    most = most_token_shards(model.layer.attention, ranks)
    return most if dcp_size == AUTO else int(dcp_size) if most % int(dcp_size) == 0 else 1


def policy_of(name: str, costs: CostModel, chunk: int) -> ShiftPolicy:
    """Return the policy that a candidate names."""
    if name == "calibrated":
        return Calibrated(costs, chunk)
    if name.startswith("tokens "):
        return TokenThreshold(int(name.removeprefix("tokens ")))
    return FixedMode(Mode(name))


def thresholds(costs: CostModel) -> list[int]:
    """Return the thresholds on a step's tokens to try. SP becomes faster one token above each, in one of the phases."""
    bounds = {tokens - 1 for phase in PHASES for tokens, mode in costs.crossovers(phase) if mode is Mode.SP}
    return sorted(bounds)


def serve(requests: Sequence[Request], candidate: Candidate, costs: CostModel, pool: int) -> Result:
    """Spread requests over the replicas in turn, simulate each replica, and combine the results."""
    server = Server(chunk=candidate.chunk, pool=pool)
    ordered = sorted(requests, key=lambda r: r.time)
    shares = [part for i in range(candidate.replicas) if (part := ordered[i :: candidate.replicas])]
    results = [simulate(part, policy_of(candidate.policy, costs, candidate.chunk), costs, server) for part in shares]
    served = [s for result in results for s in result.served]
    return Result(
        served,
        {mode: sum(r.steps[mode] for r in results) for mode in Mode},
        {mode: sum(r.tokens[mode] for r in results) for mode in Mode},
        sum(r.switches for r in results),
        max(s.request.time + s.e2e for s in served) - ordered[0].time,
        sum(r.step_seconds for r in results),
        [gap for r in results for gap in r.gaps],
    )


def search(
    model: Model,
    gpu: Gpu,
    gpus: int,
    requests: Sequence[Request],
    kv_dtype: str = "bfloat16",
    progress: Callable[[str], None] = lambda _: None,
    dcp_size: int | str = 1,
) -> Plan:
    """Find the best way to serve.

    Args:
        model: The model.
        gpu: The kind of the GPUs.
        gpus: Number of GPUs.
        requests: The traffic, at least one request.
        kv_dtype: The dtype of the KV cache: ``bfloat16`` or ``fp8``.
        progress: Called with the description of each candidate before it is tried.
        dcp_size: ``--dcp-size``. Layouts for which it is not possible have 1.

    Raises:
        ShiftError: no layout fits.
    """
    longest = max(r.prompt + r.output for r in requests)
    flood = [replace(r, time=0.0) for r in islice(cycle(requests), PEAK_REQUESTS)]

    def attempt(candidate: Candidate, costs: CostModel) -> Trial:
        gpu_memory = memory(
            model, gpu, candidate.layout, candidate.chunk, kv_dtype,
            shifts=candidate.shifts, token_shards=candidate.token_shards,
        )  # fmt: skip
        if gpu_memory.tokens < longest:
            return Trial(candidate, gpu_memory, costs, {}, 0.0)
        progress(describe(candidate))
        metrics = serve(requests, candidate, costs, gpu_memory.tokens).metrics()
        peak = serve(flood, candidate, costs, gpu_memory.tokens).throughput
        return Trial(candidate, gpu_memory, costs, metrics, peak)

    trials = []
    for layout, replicas in layouts(model, gpus):
        shards = token_shards_of(model, layout.world_size, dcp_size)
        costs = StepTimes(model, gpu, layout, kv_dtype, token_shards=shards).cost_model()
        policy = "calibrated" if layout.sp_size > 1 else "tp"
        trials.append(attempt(Candidate(layout, replicas, policy=policy, token_shards=shards), costs))
    if not any(trial.metrics for trial in trials):
        largest = max(trials, key=lambda o: o.memory.tokens)
        raise ShiftError(
            f"{model.name} does not fit {gpus} x {gpu.name}: no layout leaves a KV cache for the longest request "
            f"({longest} tokens; the most is {largest.memory.tokens}); give more GPUs or shorter requests"
        )
    load = offered_load(requests)
    overloaded = load > max(trial.peak for trial in trials)

    def best_of(trials: list[Trial]) -> Trial:
        return min((o for o in trials if o.metrics), key=lambda o: cost(o, overloaded))

    best = best_of(trials)
    settings = [best]
    settings += [attempt(replace(best.candidate, chunk=c), best.costs) for c in CHUNKS if c != CHUNK]
    best = best_of(settings)
    settings += [attempt(candidate, best.costs) for candidate in policies(best)]
    return Plan(best_of(settings), trials, settings, gpus, kv_dtype, load, overloaded)


def policies(best: Trial) -> list[Candidate]:
    """Return the best candidate with other policies, if it may shift. TP alone needs no base weights."""
    shifting = best.candidate
    if not shifting.shifts:
        return []
    tp = replace(shifting, layout=RankLayout(shifting.layout.world_size, 1), policy="tp")
    # A threshold of 0 tokens means SP for every step, which is tried anyway.
    names = ["sp", *(f"tokens {n}" for n in thresholds(best.costs) if n)]
    return [tp, *(replace(shifting, policy=name) for name in names)]


def describe(candidate: Candidate) -> str:
    """Describe a candidate in a few words."""
    layout = candidate.layout
    return (
        f"{candidate.replicas} x (P={layout.world_size}, S={layout.sp_size}), chunk {candidate.chunk}, "
        f"policy {candidate.policy}" + (f", --dcp-size {candidate.token_shards}" if candidate.token_shards > 1 else "")
    )
