"""What the flags amount to: one record, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_THRESHOLD = 256


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
