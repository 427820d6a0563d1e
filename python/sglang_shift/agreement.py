"""All ranks and nodes must have been started alike: checked before the model loads."""

from __future__ import annotations

import datetime
import json
import logging
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.runtime_context import get_model, get_parallel

from sglang_shift import __version__
from sglang_shift.config import QUEUE_FIELDS, ShiftConfig
from sglang_shift.errors import ShiftError

logger = logging.getLogger(__name__)

WAIT = datetime.timedelta(seconds=120)


def statement(config: ShiftConfig) -> dict[str, Any]:
    """What a rank says of itself, flat; must be equal on all."""
    return {
        "sglang": version("sglang"),
        "sglang_shift": __version__,
        "torch": torch.__version__,
        "--tp-size": config.world_size,
        "--sp-size": config.sp_size,
        "--enable-shift-parallel": config.switching,
        "policy": config.policy,
        "--shift-threshold": config.threshold,
        **{"--shift-" + name.replace("_", "-"): getattr(config, name) for name in QUEUE_FIELDS},
        "--shift-calibration": config.calibration,
        "--shift-exchange": config.exchange,
        "--shift-exchange-dtype": config.exchange_dtype,
        "--shift-graph-buckets": config.graph_buckets,
        "--dtype": str(get_model().dtype),
    }


def check(config: ShiftConfig) -> None:
    """Compare this rank's statement with every other's.

    Through the rendezvous store rather than a collective, so that a rank which runs stock SGLang,
    and says nothing, is reported instead of waited for without end.

    Raises:
        ShiftError: a rank differs or is silent; names both ranks and both values.
    """
    group = get_parallel().tp_group
    store = dist.PrefixStore("sglang_shift/agreement", dist.distributed_c10d._get_default_store())
    mine = statement(config)
    store.set(str(group.rank_in_group), json.dumps(mine))
    for other in range(group.world_size):
        try:
            store.wait([str(other)], WAIT)
        except (dist.DistStoreError, RuntimeError):
            raise _logged(
                f"rank {other} was started without sglang_shift: rank {group.rank_in_group} has "
                f"--sp-size {config.sp_size} and waited {WAIT.seconds} s for it; start every node with the same command"
            ) from None
        if problem := difference(group.rank_in_group, mine, other, json.loads(store.get(str(other)))):
            raise _logged(problem)


def difference(rank: int, mine: dict[str, Any], other: int, theirs: dict[str, Any]) -> str | None:
    """One sentence that names both ranks and both values, or None where they agree."""
    differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    if not differing:
        return None
    pairs = ", ".join(f"{k} is {mine.get(k)} on rank {rank} and {theirs.get(k)} on rank {other}" for k in differing)
    return f"ranks were started differently: {pairs}; start every node with the same command and versions"


def _logged(message: str) -> ShiftError:
    logger.error("sglang_shift: %s", message)
    return ShiftError(message)
