"""What the flags amount to: one record, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.arg_groups.overrides import resolution_result

from sglang_shift.modes import ShiftPolicy, make_policy

DEFAULT_THRESHOLD = 256


@dataclass(frozen=True)
class ShiftConfig:
    """A deployment's parallelism, resolved.

    Attributes:
        world_size: P.
        sp_size: S.
        switching: Whether steps may differ (``--enable-shift-parallel``).
        policy: Name of the policy that chooses each step's mode.
        threshold: N of the ``tokens`` policy.
    """

    world_size: int
    sp_size: int
    switching: bool
    policy: str
    threshold: int

    def make_policy(self) -> ShiftPolicy:
        """The policy object."""
        return make_policy(self.policy, self.threshold)


def shift_config_of(server_args: Any) -> ShiftConfig | None:
    """The configuration that ``server_args`` ask for, or None where they ask for stock SGLang.

    Args:
        server_args: A :class:`sglang_shift.server_args.ShiftServerArgs`, or any of SGLang's.
    """
    if not hasattr(server_args, "sp_size"):
        return None

    def value(name: str) -> Any:
        return resolution_result(server_args, name)

    switching = bool(value("enable_shift_parallel"))
    if not switching and value("sp_size") is None:
        return None
    world_size = value("tp_size")
    return ShiftConfig(
        world_size=world_size,
        sp_size=world_size if value("sp_size") is None else value("sp_size"),
        switching=switching,
        policy=(value("shift_policy") or "tokens") if switching else "sp",
        threshold=DEFAULT_THRESHOLD if value("shift_threshold") is None else value("shift_threshold"),
    )
