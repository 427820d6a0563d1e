"""Makes calibrations: step times of made-up servers whose modes cross at known token counts.

python test/support/calibrations.py DIR    # writes one file per server, for benchmark/policies.py
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from sglang_shift.cost.model import PHASES, CostModel, Curve, Measurement, fit
from sglang_shift.modes import Mode

PREFILL_TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512)
ATTENTION = {"prefill": 4e-10, "decode": 2e-9}
CONTEXTS = {"prefill": (0, 1024), "decode": (64, 1024)}  # the two measured numbers of cached tokens of a request


def line(start_ms: float, slope_us: float) -> Callable[[int], float]:
    """Return a function from tokens to seconds: ``start_ms`` milliseconds, and ``slope_us`` microseconds per token."""
    return lambda tokens: 1e-3 * start_ms + 1e-6 * slope_us * tokens


SERVERS: dict[str, dict[tuple[str, Mode], Callable[[int], float]]] = {
    "sp-always": {  # SP is always faster
        ("prefill", Mode.TP): line(12.0, 60),
        ("prefill", Mode.SP): line(9.0, 35),
        ("decode", Mode.TP): line(8.0, 40),
        ("decode", Mode.SP): line(6.0, 25),
    },
    "crossovers-differ": {  # prefill crosses at 64 tokens, decode at 200
        ("prefill", Mode.TP): line(6.0, 75),
        ("prefill", Mode.SP): line(8.56, 35),
        ("decode", Mode.TP): line(5.0, 45),
        ("decode", Mode.SP): line(10.0, 20),
    },
    "crossovers-equal": {  # both phases cross at 128 tokens
        ("prefill", Mode.TP): line(6.0, 75),
        ("prefill", Mode.SP): line(11.12, 35),
        ("decode", Mode.TP): line(5.0, 65),
        ("decode", Mode.SP): line(10.12, 25),
    },
}

LINE = Curve((1, 10_001), (1.0, 10_001.0))
SECOND_A_TOKEN = CostModel(
    {phase: dict.fromkeys(Mode, LINE) for phase in PHASES},
    dict.fromkeys(PHASES, Curve((1,), (1e9,))),
    dict.fromkeys(PHASES, 0.0),
    0.0,
)
"""A step takes a second for each token, in both modes, and attention takes no time."""


def kv_reads(phase: str, tokens: int, context: int) -> int:
    """Return the KV reads of a step: one prompt after a cached prefix, or ``tokens`` requests that decode."""
    return tokens * context + (tokens * (tokens + 1) // 2 if phase == "prefill" else 0)


def measurements(server: str, sigma: float = 0.0, seed: int = 0) -> list[Measurement]:
    """Return the measured step times of a server, with a relative error of ``sigma``."""
    rng = random.Random(seed)
    samples = []
    for (phase, mode), seconds in SERVERS[server].items():
        for tokens in PREFILL_TOKENS if phase == "prefill" else DECODE_TOKENS:
            for context in CONTEXTS[phase]:
                reads = kv_reads(phase, tokens, context)
                exact = seconds(tokens) + ATTENTION[phase] * reads
                samples.append(Measurement(phase, mode, tokens, reads, exact * rng.lognormvariate(0, sigma)))
    return samples


def write(folder: Path) -> None:
    """Write a calibration file for each server."""
    folder.mkdir(parents=True, exist_ok=True)
    for server in SERVERS:
        samples = measurements(server)
        content = {"measurements": samples, "costs": fit(samples)}
        (folder / f"{server}.json").write_bytes(msgspec.json.encode(content))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
