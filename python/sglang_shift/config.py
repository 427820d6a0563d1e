"""What the flags amount to: one record, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_THRESHOLD = 256

QUEUE_FIELDS = ("enter_requests", "leave_requests", "enter_tokens", "leave_tokens")
"""Fields of :class:`ShiftConfig` and of the policy ``queue-depth``; the flags are ``--shift-...``."""


def policies_using(field: str) -> tuple[str, ...]:
    """The policies that a threshold is for; ``field`` is its name in the server arguments."""
    return ("tokens", "queue-depth") if field == "shift_threshold" else ("queue-depth",)


@dataclass(frozen=True)
class ShiftConfig:
    """A deployment's parallelism, resolved.

    Attributes:
        world_size: P.
        sp_size: S.
        switching: Whether steps may differ (``--enable-shift-parallel``).
        policy: Name of the policy that chooses each step's mode, or ``module:Class``.
        threshold: Tokens of the ``tokens`` and ``queue-depth`` policies.
        enter_requests: Of ``queue-depth``, as the three that follow.
        leave_requests: See :class:`sglang_shift.policy.builtin.QueueDepth`.
        enter_tokens: See :class:`sglang_shift.policy.builtin.QueueDepth`.
        leave_tokens: See :class:`sglang_shift.policy.builtin.QueueDepth`.
        calibration: ``auto``, ``off``, or a file.
        exchange: Backend of the exchange: ``auto``, ``flashinfer`` or ``collective``.
        exchange_dtype: What it sends: ``auto``, the activations as they are, or ``fp8``.
        graph_buckets: At most so many CUDA graphs of each phase in SP; None for as many as there is use for.
    """

    world_size: int
    sp_size: int
    switching: bool
    policy: str
    threshold: int = DEFAULT_THRESHOLD
    enter_requests: int = 32
    leave_requests: int = 16
    enter_tokens: int = 2048
    leave_tokens: int = 512
    calibration: str = "off"
    exchange: str = "auto"
    exchange_dtype: str = "auto"
    graph_buckets: int | None = None


def shift_config_of(server_args: Any) -> ShiftConfig | None:
    """The configuration that ``server_args`` ask for, or None where they ask for stock SGLang.

    Args:
        server_args: A :class:`sglang_shift.args.server_args.ShiftServerArgs`, or any of SGLang's.
    """
    from sglang.srt.arg_groups.overrides import resolution_result

    if not hasattr(server_args, "sp_size"):
        return None

    def value(name: str) -> Any:
        return resolution_result(server_args, name)

    switching = bool(value("enable_shift_parallel"))
    if not switching and value("sp_size") is None:
        return None
    world_size = value("tp_size")
    calibration = value("shift_calibration") or "auto"
    policy = value("shift_policy")
    if not switching:
        policy = "sp"
    elif policy is None:
        # Who gives a threshold has made up their mind.
        policy = "tokens" if calibration == "off" or value("shift_threshold") is not None else "calibrated"
    given = {name: value("shift_" + name) for name in ("threshold", *QUEUE_FIELDS)}
    return ShiftConfig(
        world_size=world_size,
        sp_size=world_size if value("sp_size") is None else value("sp_size"),
        switching=switching,
        policy=policy,
        calibration=calibration if policy == "calibrated" else "off",
        exchange=value("shift_exchange") or "auto",
        exchange_dtype=value("shift_exchange_dtype") or "auto",
        graph_buckets=value("shift_graph_buckets"),
        **{name: number for name, number in given.items() if number is not None},
    )
