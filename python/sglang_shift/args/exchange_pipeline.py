"""Check and resolve ``--shift-exchange-pipeline``: which servers can exchange heads group by group."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import attention_backends_of
from sglang.srt.model_executor.cuda_graph_config import Backend

from sglang_shift.args.feature import Feature, first_requested, uses_lora
from sglang_shift.args.sp_size import uses_shift_cpu_platform
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.flags import AUTO
from sglang_shift.models.decoder_config import architecture_of
from sglang_shift.models.families import FAMILIES
from sglang_shift.models.heads import Heads
from sglang_shift.platforms.cpu import ATTENTION

NOT_POSSIBLE = Refusal(
    "--shift-exchange-pipeline on is not possible, because {reason}; give auto or off",
    "The pipelined exchange is tested for dense models on CPUs, and for no feature that changes attention. On GPUs it "
    "has never run. With auto, such a server uses the ordinary exchange.",
)
GPU_BACKENDS = ("triton", "fa3")
"""Attention backends of GPUs whose prefills take any number of query heads. FlashInfer plans a step for one number."""

FEATURES = (
    Feature("--shift-exchange-dtype fp8", lambda a: a.shift_exchange_dtype == "fp8",
     "a row would have a scale for each group, so answers would differ from those of the ordinary exchange"),
    Feature("--shift-sparse-prefill", lambda a: a.shift_sparse_prefill,
     "each group would record for itself what it left out"),
    Feature("--dcp-size above 1", lambda a: a.dcp_size > 1, "the ranks exchange queries inside of attention, too"),
    Feature("--instances", lambda a: a.instances is not None, "each level has an attention module of its own"),
    Feature("--speculative-algorithm", lambda a: a.speculative_algorithm is not None,
     "it has not been tested with drafts"),
    Feature("--disaggregation-mode", lambda a: a.disaggregation_mode not in (None, "null"),
     "it has not been tested with two servers"),
    Feature("--enable-lora", uses_lora, "it has not been tested with adapters"),
)  # fmt: skip


def resolved_exchange_pipeline(settings: Any, model_config: Any, config: ShiftConfig) -> tuple[str, str]:
    """Return the value that takes effect, and why it is not the value that was given, as a clause; empty if it is.

    Args:
        settings: A view of the resolved server arguments.
        model_config: SGLang's configuration of the model.
        config: The configuration that follows from the arguments.

    Raises:
        Refused: the user asked for the pipelined exchange, and it is not possible.
    """
    wanted = config.exchange_pipeline
    if wanted == "off":
        return wanted, ""
    reason = why_not(settings, model_config)
    if reason and wanted == "on":
        raise NOT_POSSIBLE(reason=reason)
    if not reason and wanted == AUTO and config.policy != "calibrated":
        reason = f"--shift-policy {config.policy} has no calibration that times it"
    return ("off", reason) if reason else (wanted, "")


def why_not(settings: Any, model_config: Any) -> str | None:
    """Why this server cannot exchange heads group by group, as a clause, or None."""
    if reason := why_not_here(settings):
        return reason
    if feature := first_requested(FEATURES, settings):
        return f"it does not combine with {feature.name}: {feature.why}"
    name = architecture_of(model_config.hf_config) or "this model"
    if name not in FAMILIES or not model_config.is_generation:
        return f"it is tested for models of {', '.join(FAMILIES)} that generate text, and this model is {name}"
    heads = Heads(model_config.num_attention_heads, model_config.get_total_num_kv_heads()).of_rank(settings.tp_size)
    if heads.query < 2 * heads.kv:
        return f"a rank has {heads.query} query heads for {heads.kv} KV heads, and it takes two for each KV head"
    return None


def why_not_here(settings: Any) -> str | None:
    """Why this server's device or attention backends have no pipelined exchange, as a clause, or None."""
    backends = sorted(set(map(str, attention_backends_of(settings))))
    if uses_shift_cpu_platform() and backends == [ATTENTION]:
        return None
    if settings.device != "cuda" or not set(backends) <= set(GPU_BACKENDS):
        return (
            f"it needs the CPU platform's attention backend, or {' or '.join(GPU_BACKENDS)} on a GPU, and this server "
            f"has {' and '.join(backends)} on {settings.device}"
        )
    if settings.cuda_graph_config.prefill.backend != Backend.DISABLED:
        return "CUDA graphs of prefills have the ordinary exchange, and --cuda-graph-backend-prefill is not disabled"
    return None
