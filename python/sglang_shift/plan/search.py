"""Which layout, chunk and policy serve some traffic best: each is tried in the step simulator.

Two rounds: every layout with one chunk and one policy; then every chunk and policy with the best layout. What is
best has the lowest mean end-to-end time, which holds the queue, the first token and all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sglang_shift.cost_model import PHASES, CostModel
from sglang_shift.errors import ShiftError
from sglang_shift.layout import RankLayout
from sglang_shift.modes import Mode, ShiftPolicy
from sglang_shift.plan.hardware import Gpu
from sglang_shift.plan.memory import Memory, memory
from sglang_shift.plan.model import Model
from sglang_shift.plan.step_time import StepTimes
from sglang_shift.policies import Calibrated, FixedMode, TokenThreshold
from sglang_shift.simulator import Result, Server, simulate
from sglang_shift.traffic import Request, scaled

CHUNK = 8192
"""SGLang's default for these GPUs."""

CHUNKS = (2048, 4096, CHUNK, 16384)
GROUPS = (1, 2, 4, 8)
"""Ranks of a replica for which there are figures."""

PEAK_REQUESTS = 2000
"""Of the traffic, taken at once to find what a candidate serves at most."""


@dataclass(frozen=True)
class Candidate:
    """A way to serve.

    Attributes:
        layout: Of each replica.
        replicas: How many.
        chunk: ``--chunked-prefill-size``.
        policy: ``tp``, ``sp``, ``calibrated`` or ``tokens N``.
    """

    layout: RankLayout
    replicas: int
    chunk: int = CHUNK
    policy: str = "tp"

    @property
    def shifts(self) -> bool:
        """Whether its steps may differ in mode."""
        return self.policy not in ("tp", "sp")


@dataclass(frozen=True)
class Outcome:
    """How a candidate did.

    Attributes:
        candidate: The candidate.
        memory: Of one GPU.
        costs: Step times of a replica.
        metrics: As of :meth:`Result.metrics`; empty where the KV cache is too small for the traffic.
        peak: Prompt and output tokens per second when all requests are there at once; 0 likewise.
    """

    candidate: Candidate
    memory: Memory
    costs: CostModel
    metrics: dict[str, float]
    peak: float


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        best: The recommendation.
        layouts: Every layout with the default chunk, TP alone or the ``calibrated`` policy.
        settings: Chunks and policies of the best layout.
    """

    best: Outcome
    layouts: list[Outcome]
    settings: list[Outcome]


def layouts(model: Model, gpus: int) -> Iterator[tuple[RankLayout, int]]:
    """All (P, S) by which the GPUs and the model can be divided, and the number of replicas."""
    for ranks in GROUPS:
        if gpus % ranks:
            continue
        try:
            model.layer.shards(ranks)
        except ShiftError:
            continue
        for sp in GROUPS:
            if ranks % sp == 0:
                yield RankLayout(ranks, sp), gpus // ranks


def policy_of(name: str, costs: CostModel, chunk: int) -> ShiftPolicy:
    """The policy that a candidate names."""
    if name == "calibrated":
        return Calibrated(costs, chunk)
    if name.startswith("tokens "):
        return TokenThreshold(int(name.removeprefix("tokens ")))
    return FixedMode(Mode(name))


def thresholds(costs: CostModel) -> list[int]:
    """Where a threshold on a step's tokens may lie: below the first number from which on SP is faster, by phase."""
    found = {tokens - 1 for phase in PHASES for tokens, mode in costs.crossovers(phase) if mode is Mode.SP}
    return sorted(found)


def serve(requests: Sequence[Request], candidate: Candidate, costs: CostModel, pool: int) -> Result:
    """Requests spread over the replicas in turn, each served by the simulator, and all taken together."""
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
        sum(r.busy for r in results),
    )


def search(
    model: Model,
    gpu: Gpu,
    gpus: int,
    requests: Sequence[Request],
    kv_dtype: str = "bfloat16",
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Find the best way to serve.

    Args:
        model: The model.
        gpu: The kind of the GPUs.
        gpus: How many.
        requests: The traffic, at least one.
        kv_dtype: Of the KV cache: ``bfloat16`` or ``fp8``.
        progress: Told what is tried next.

    Raises:
        ShiftError: no layout fits.
    """
    longest = max(r.prompt + r.output for r in requests)

    def attempt(candidate: Candidate, costs: CostModel) -> Outcome:
        held = memory(model, gpu, candidate.layout, candidate.chunk, kv_dtype)
        if held.tokens < longest:
            return Outcome(candidate, held, costs, {}, 0.0)
        progress(describe(candidate))
        metrics = serve(requests, candidate, costs, held.tokens).metrics()
        peak = serve(scaled(requests[:PEAK_REQUESTS], time=0.0), candidate, costs, held.tokens).throughput
        return Outcome(candidate, held, costs, metrics, peak)

    tried = []
    for layout, replicas in layouts(model, gpus):
        costs = StepTimes(model, gpu, layout, kv_dtype).cost_model()
        policy = "calibrated" if layout.sp_size > 1 else "tp"
        tried.append(attempt(Candidate(layout, replicas, policy=policy), costs))
    fitting = [outcome for outcome in tried if outcome.metrics]
    if not fitting:
        most = max(tried, key=lambda o: o.memory.tokens)
        raise ShiftError(
            f"{model.name} does not fit {gpus} x {gpu.name}: no layout leaves a KV cache for the longest request "
            f"({longest} tokens; the most is {most.memory.tokens}); give more GPUs or shorter requests"
        )
    best = min(fitting, key=_end_to_end)
    # A threshold of no tokens is SP throughout, which is tried anyway.
    names = ["tp", "sp", *(f"tokens {n}" for n in thresholds(best.costs) if n)] if best.candidate.shifts else []
    settings = [best]
    settings += [attempt(replace(best.candidate, chunk=c), best.costs) for c in CHUNKS if c != CHUNK]
    best = min((o for o in settings if o.metrics), key=_end_to_end)
    settings += [attempt(replace(best.candidate, policy=name), best.costs) for name in names]
    return Plan(min((o for o in settings if o.metrics), key=_end_to_end), tried, settings)


def _end_to_end(outcome: Outcome) -> float:
    return outcome.metrics["mean_e2e"]


def describe(candidate: Candidate) -> str:
    """In a few words."""
    layout = candidate.layout
    return (
        f"{candidate.replicas} x (P={layout.world_size}, S={layout.sp_size}), chunk {candidate.chunk}, "
        f"policy {candidate.policy}"
    )
