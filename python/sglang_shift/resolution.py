"""Computes the settings that follow from our flags, after SGLang has resolved its server arguments."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import resolution_result

from sglang_shift.config import ShiftConfig
from sglang_shift.flags import FLAGS


def shift_config_of(server_args: Any) -> ShiftConfig | None:
    """The configuration that ``server_args`` ask for, or None if they ask for stock SGLang.

    Args:
        server_args: A :class:`sglang_shift.args.server_args.ShiftServerArgs`, or SGLang's ``ServerArgs``.
    """
    if not hasattr(server_args, "sp_size"):
        return None
    settings = {flag.setting: resolution_result(server_args, flag.name) for flag in FLAGS}
    switching = bool(settings["switching"])
    if not switching and settings["sp_size"] is None and settings["instances"] is None:
        return None
    world_size = resolution_result(server_args, "tp_size")
    calibration = settings["calibration"] or "auto"
    policy = settings["policy"]
    if not switching:
        # The resolution stores the policy, because it also fills in the size.
        policy = policy or ("sp" if settings["sp_size"] is not None else "tp")
    elif policy is None:
        # A user who gives a threshold wants the policy tokens. Without a calibration, calibrated cannot run.
        policy = "tokens" if calibration == "off" or settings["threshold"] is not None else "calibrated"
    settings.update(
        sp_size=world_size if settings["sp_size"] is None else settings["sp_size"],
        switching=switching,
        policy=policy,
        calibration=calibration if policy == "calibrated" else "off",
    )
    return ShiftConfig(world_size, **{name: value for name, value in settings.items() if value is not None})
