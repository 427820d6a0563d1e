"""Summarizes the hub's recent steps, requests and states, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sglang_shift.modes import MODES
from sglang_shift.observe.events import Finished

PHASES = ("prefill", "decode", "mixed")
PERCENTILES = ("p50", "p90", "p99")

Number = TypeVar("Number", int, float)


class Step(NamedTuple):
    """The data that is kept of a step. The fields are fields of :class:`StepEvent`."""

    time: float
    mode: str
    phase: str
    tokens: int
    seconds: float | None
    predicted: float | None


class BoundedStep(NamedTuple):
    """The data that is kept of a step with prompts under a bound on the gap between tokens.

    The fields are fields of :class:`StepEvent`.
    """

    prefill_tokens: int
    chunk_room: int
    chunk_budget: float
    seconds: float | None


def bound(states: Sequence[tuple[float, dict[str, Any]]], steps: Sequence[BoundedStep]) -> dict[str, Any] | None:
    """Return the bound on the gap between tokens, and the recent steps under it; None without a bound."""
    first = states[0][1] if states else {}
    if not first.get("tbt_target"):
        return None
    timed = [s for s in steps if s.seconds is not None]
    return {
        "target": first["tbt_target"],
        "margin": first["tbt_margin"],
        "chunks": {
            "count": len(steps),
            "tokens": percentiles(s.prefill_tokens for s in steps),
            "room": percentiles(s.chunk_room for s in steps),
            "budget": percentiles(s.chunk_budget for s in steps),
            "over_budget": sum(s.seconds > s.chunk_budget for s in timed if s.seconds) / len(timed) if timed else None,
        },
    }


def service(states: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Return what is served and how (from the first replica), the totals over all replicas, and each replica's data."""
    first = states[0][1] if states else {}
    shared = ("model", "world_size", "sp_size", "policy", "policy_text", "calibration", "calibration_text")
    own = ("replica", "policy", "policy_text", "drift", "weight_bytes", "weight_bytes_beyond_base", "steps", "tokens")
    return {name: first.get(name) for name in shared} | {
        "totals": {
            "steps": {mode: sum(s["steps"].get(mode, 0) for _, s in states) for mode in MODES},
            "tokens": {mode: sum(s["tokens"].get(mode, 0) for _, s in states) for mode in MODES},
            "switches": sum(s["switches"] for _, s in states),
        },
        "replicas": [
            {"age": age} | {name: s[name] for name in (*own, "switches", "running", "waiting")} for age, s in states
        ],
    }


def columns(steps: Sequence[Step]) -> dict[str, list[Any]]:
    """Return the steps as columns: one list for each field."""
    return {
        "time": [round(s.time, 3) for s in steps],
        **{name: [getattr(s, name) for s in steps] for name in ("mode", "phase", "tokens")},
        **{name: [_round_seconds(getattr(s, name)) for s in steps] for name in ("seconds", "predicted")},
    }


def step_times(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return percentiles of the recent steps' times by mode and phase, and the ratio of actual to predicted times."""
    rows = []
    for mode in MODES:
        for phase in PHASES:
            mine = [s for s in steps if (s.mode, s.phase) == (mode, phase)]
            timed = [(s.seconds, s.predicted) for s in mine if s.seconds is not None]
            quantiles = percentiles(seconds for seconds, _ in timed)
            if quantiles:
                both = [(seconds, predicted) for seconds, predicted in timed if predicted]
                ratio = sum(s for s, _ in both) / sum(p for _, p in both) if both else None
                rows.append(
                    {"mode": mode, "phase": phase, "count": len(timed), "actual_over_predicted": ratio, **quantiles}
                )
    return rows


def request_percentiles(requests: Sequence[Finished]) -> dict[str, Any]:
    """Return percentiles over the requests that finished last."""
    value: dict[str, Any] = {"count": len(requests)}
    for name in ("ttft", "tpot", "e2e", "prompt_tokens", "output_tokens"):
        value[name] = percentiles(x for x in (finite(getattr(r, name)) for r in requests) if x is not None)
    value["steps"] = {mode: sum(r.steps.get(mode, 0) for r in requests) for mode in MODES}
    return value


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """Return the 50th, 90th and 99th percentile, interpolated; None if there are no values."""
    numbers = list(values)
    return dict(zip(PERCENTILES, np.percentile(numbers, (50, 90, 99)).tolist(), strict=True)) if numbers else None


def finite(value: Number | None) -> Number | None:
    """Return ``value`` if it is a finite number of at least 0, else None."""
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def _round_seconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 7)


def jsonable(value: Any) -> Any:
    """Return ``value``, with None instead of floats that JSON does not have."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
