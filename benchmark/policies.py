#!/usr/bin/env python3
"""Compare policies in the simulator, on the step times of a calibration.

    python benchmark/policies.py --calibration FILE                     # made-up traffic
    python benchmark/policies.py --calibration FILE --trace FILE.csv    # and a window of a trace
    python benchmark/policies.py --calibration FILE --noise 0.05        # measured with 5 % error

FILE is JSON: {"measurements": [{"phase", "mode", "tokens", "kv_reads", "seconds"}, ...], "costs": {...}}. Without
"costs", a cost model is fitted to the measurements. Steps take the time that the costs say. The ``calibrated`` policy
believes the same costs. With --noise, it believes a model that is fitted to perturbed measurements.

The rates follow from the costs, so every calibration sees an idle and a saturated server. The capacity of some traffic
is the rate at which the better fixed mode serves its requests, if all requests are there at once.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
from sglang_shift.cost.model import CostModel, Measurement, fit
from sglang_shift.modes import Mode, ShiftPolicy
from sglang_shift.policy.builtin import Calibrated, FixedMode, QueueDepth, TokenThreshold
from sglang_shift.simulate.simulator import Server, simulate
from sglang_shift.simulate.traces import read_trace
from sglang_shift.simulate.traffic import Lengths, Request, bursty, cut_window, ramp, scale, steady

THRESHOLDS = (0, *(2**i for i in range(14)))
LOWER_IS_BETTER = {"mean_ttft": True, "mean_tpot": True, "throughput": False, "mean_e2e": True, "p99_e2e": True}
LOW, HIGH = 0.1, 0.85  # of the capacity, in steady traffic
RAMP = (0.05, 1.1)
STREAM, BURSTS = 0.15, 0.35  # of the capacity on average, in bursty traffic
BURST_RATE = 1.5  # of the capacity: a burst brings more than the server can serve
TRACE = 0.5  # of the capacity on average: the trace itself goes beyond the capacity and down to nothing

Metrics = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """The made-up traffic.

    Attributes:
        prompt: Prompt tokens.
        output: Output tokens.
        requests: Requests in a steady load and in the ramp. Half of this number come between bursts.
        burst: Requests in a burst.
        seeds: Number of seeds. Each load is made once per seed, and its metrics are means over the seeds. A single run
            is chaotic, because the time of each step decides which requests are there for the next step.
        seed: The first of the seeds.
    """

    prompt: Lengths = (16, 1024)
    output: Lengths = (64, 1024)
    requests: int = 2000
    burst: int = 400
    seeds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Traffic:
    """A load to compare policies under.

    Attributes:
        name: Its name in reports.
        text: Its description.
        samples: The requests, once per seed.
    """

    name: str
    text: str
    samples: list[list[Request]]


def capacity(requests: Sequence[Request], costs: CostModel, server: Server) -> tuple[float, Mode]:
    """Return the requests per second of the better fixed mode if all ``requests`` are there at once, and this mode."""
    at_once = scale(requests, time=0.0)
    return max((len(at_once) / simulate(at_once, FixedMode(mode), costs, server).makespan, mode) for mode in Mode)


def synthetic_traffic(costs: CostModel, server: Server, shape: Shape) -> list[Traffic]:
    """Make steady low, steady high, ramp and bursty traffic for a server of these costs."""
    lengths: dict[str, Any] = {"prompt": shape.prompt, "output": shape.output}
    seeds = range(shape.seed, shape.seed + shape.seeds)
    most, mode = capacity(steady(1.0, requests=shape.requests, seed=shape.seed, **lengths), costs, server)
    of = f"of the capacity of {mode.value.upper()}, {most:.4g} requests/s"
    common = {"requests": shape.requests, **lengths}
    loads = [
        Traffic(
            f"steady {name}",
            f"{share:.0%} {of}: {shape.requests} requests at {share * most:.4g}/s",
            [steady(share * most, seed=seed, **common) for seed in seeds],
        )
        for name, share in (("low", LOW), ("high", HIGH))
    ]
    first, last = RAMP
    samples = [ramp(first * most, last * most, seed=seed, **common) for seed in seeds]
    loads.append(Traffic("ramp", f"{first:.0%} to {last:.0%} {of}: {shape.requests} requests", samples))
    lengths["burst"] = shape.burst
    lengths["every"] = every = shape.burst / (BURSTS * most)
    lengths["burst_seconds"] = shape.burst / (BURST_RATE * most)
    seconds = shape.requests / 2 / (STREAM * most)
    samples = [bursty(STREAM * most, seconds=seconds, seed=seed, **lengths) for seed in seeds]
    text = f"{STREAM:.0%} {of}; every {every:.4g} s, {shape.burst} requests on top at {BURST_RATE:.0%}"
    return [*loads, Traffic("bursty", text, samples)]


def from_trace(path: Path, costs: CostModel, server: Server, part: tuple[float, float], context: int) -> Traffic:
    """Take a window of a trace, at a pace that keeps the better fixed mode busy half of the time."""
    start, seconds = part
    requests = scale(cut_window(read_trace(path), start, seconds), context=context)
    most, mode = capacity(requests, costs, server)
    pace = len(requests) / seconds / (TRACE * most)
    text = (
        f"{len(requests)} requests of {path.name} from second {start:g} to {start + seconds:g}, in {pace:.4g} times "
        f"their time: {TRACE:.0%} of the capacity of {mode.value.upper()}, {most:.4g} requests/s"
    )
    return Traffic("bursty (trace)", text, [scale(requests, time=pace)])


def policies(policy_costs: CostModel, server: Server) -> dict[str, ShiftPolicy]:
    """Return all policies by name: fixed modes, fixed thresholds, queue depth, calibrated."""
    return {
        **{mode.value: FixedMode(mode) for mode in Mode},
        **{f"tokens {n}": TokenThreshold(n) for n in THRESHOLDS},
        "queue-depth": QueueDepth(),
        "calibrated": Calibrated(policy_costs, server.chunk),
    }


def compare(traffic: Traffic, costs: CostModel, policy_costs: CostModel, server: Server) -> dict[str, Metrics]:
    """Return the metrics of each policy on this traffic."""
    results = {}
    for name, policy in policies(policy_costs, server).items():
        runs = [simulate(requests, policy, costs, server).metrics() for requests in traffic.samples]
        results[name] = {metric: fmean(run[metric] for run in runs) for metric in runs[0]}
    return results


def ratios(results: dict[str, Metrics], names: Sequence[str]) -> Metrics:
    """Return, for each metric, ``calibrated`` over the policy of ``names`` that is best in this metric."""
    return {
        metric: results["calibrated"][metric] / (min if lower else max)(results[name][metric] for name in names)
        for metric, lower in LOWER_IS_BETTER.items()
    }


def best_ratios(results: dict[str, Metrics]) -> dict[str, Metrics]:
    """Return ``calibrated`` over the best fixed mode, and over the best fixed threshold."""
    return {
        "calibrated / best fixed mode": ratios(results, [mode.value for mode in Mode]),
        "calibrated / best threshold": ratios(results, [f"tokens {n}" for n in THRESHOLDS]),
    }


def table(results: dict[str, Metrics]) -> str:
    """Return the results and ratios as a Markdown table."""
    lines = [
        "| Policy | Mean TTFT, ms | Mean TPOT, ms | Tokens/s | Mean E2E, s | p99 E2E, s | Switches |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, m in results.items():
        lines.append(
            f"| {name} | {1e3 * m['mean_ttft']:.2f} | {1e3 * m['mean_tpot']:.3f} | {m['throughput']:.1f} "
            f"| {m['mean_e2e']:.4f} | {m['p99_e2e']:.3f} | {m['switches']:.0f} |"
        )
    for name, by_metric in best_ratios(results).items():
        lines.append(f"| **{name}** | " + " | ".join(f"{by_metric[metric]:.4f}" for metric in LOWER_IS_BETTER) + " | |")
    return "\n".join(lines)


class CalibrationPart(msgspec.Struct):
    """The part of a calibration that is read: the step times, and the cost model if there is one."""

    measurements: list[Measurement]
    costs: CostModel | None = None


def read_calibration(path: Path, noise: float = 0.0, seed: int = 0) -> tuple[CostModel, CostModel]:
    """Return the costs of the steps, and the costs that ``calibrated`` believes.

    Args:
        path: The calibration.
        noise: Standard deviation of the logarithm of the error, for each measurement that the policy believes.
        seed: Seed of the noise.
    """
    calibration = msgspec.json.decode(path.read_bytes(), type=CalibrationPart)
    costs = calibration.costs or fit(calibration.measurements)
    if not noise:
        return costs, costs
    rng = random.Random(seed)
    wrong = [replace(m, seconds=m.seconds * rng.lognormvariate(0.0, noise)) for m in calibration.measurements]
    return costs, fit(wrong, costs.switch_seconds)


def crossovers(costs: CostModel) -> str:
    """Return the numbers of tokens at which each phase changes mode, in words."""
    modes = {p: [f"{m.value.upper()} from {n}" for n, m in costs.crossovers(p)] for p in ("prefill", "decode")}
    return "; ".join(f"{phase} {', '.join(texts)}" for phase, texts in modes.items())


def lengths(text: str) -> Lengths:
    """Parse ``N`` or ``LOW-HIGH`` of the command line."""
    low, _, high = text.partition("-")
    return (int(low), int(high)) if high else int(low)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`server_of` reads."""
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--chunk", type=int, default=Server.chunk, help="prompt tokens in a step (%(default)s)")
    parser.add_argument("--pool", type=int, default=Server.pool, help="tokens in the KV pool (%(default)s)")
    parser.add_argument("--max-running", type=int, default=Server.max_running, help="requests (%(default)s)")


def server_of(arguments: argparse.Namespace) -> Server:
    """Return the server that the arguments describe."""
    return Server(arguments.chunk, arguments.pool, arguments.max_running)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser)
    shape = Shape()
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Azure's (.csv) or Mooncake's (.jsonl)")
    parser.add_argument("--window", type=float, nargs=2, default=(1080.0, 900.0), metavar=("START", "SECONDS"))
    parser.add_argument("--context", type=int, default=32_768, help="longest request of the trace (%(default)s)")
    parser.add_argument("--prompt", type=lengths, default=shape.prompt, metavar="N|LOW-HIGH", help="made-up prompts")
    parser.add_argument("--output", type=lengths, default=shape.output, metavar="N|LOW-HIGH", help="their outputs")
    parser.add_argument("--requests", type=int, default=shape.requests, help="in each made-up load (%(default)s)")
    parser.add_argument("--burst", type=int, default=shape.burst, help="requests in a burst (%(default)s)")
    parser.add_argument("--noise", type=float, default=0.0, metavar="SIGMA", help="error of what the policy believes")
    parser.add_argument("--seeds", type=int, default=shape.seeds, help="runs of each made-up load (%(default)s)")
    parser.add_argument("--seed", type=int, default=shape.seed, help="the first one (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write policies.json and policies.md there")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    costs, policy_costs = read_calibration(arguments.calibration, arguments.noise, arguments.seed)
    server = server_of(arguments)
    shape = Shape(**{name: getattr(arguments, name) for name in asdict(Shape())})
    traffics = synthetic_traffic(costs, server, shape)
    if arguments.trace is not None:
        traffics.append(from_trace(arguments.trace, costs, server, tuple(arguments.window), arguments.context))
    text = [
        f"# Policies on {arguments.calibration.name}\n",
        f"Faster mode: {crossovers(costs)} tokens on. A switch costs {1e3 * costs.switch_seconds:g} ms.",
        f"The policy believes: {crossovers(policy_costs)} (noise {arguments.noise:g}).",
        f"Server: {asdict(server)}. Made-up requests: {asdict(shape)}.",
    ]
    print("\n".join(text), flush=True)
    report: dict[str, Any] = {}
    for traffic in traffics:
        results = compare(traffic, costs, policy_costs, server)
        report[traffic.name] = {"text": traffic.text, "policies": results, "ratios": best_ratios(results)}
        text.append(f"\n## {traffic.name}\n\n{traffic.text}\n\n{table(results)}")
        print(text[-1], flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        content = {"settings": settings, "costs": costs, "believed": policy_costs, "traffics": report}
        encoded = msgspec.json.format(msgspec.json.encode(content), indent=1)
        (arguments.out / "policies.json").write_bytes(encoded + b"\n")
        (arguments.out / "policies.md").write_text("\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
