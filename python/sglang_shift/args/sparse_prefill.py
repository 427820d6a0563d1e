"""Check ``--shift-sparse-prefill``: what must be exact, and whose attention can leave out blocks."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import attention_backends_of
from sglang.srt.configs.model_config import AttentionArch

from sglang_shift.args.feature import Feature, first_requested
from sglang_shift.args.sp_size import uses_shift_cpu_platform
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.models.decoder_config import architecture_of
from sglang_shift.models.whole_prefixes import other_layers
from sglang_shift.platforms.cpu import ATTENTION

NOT_A_SHARE = Refusal(
    "--shift-sparse-prefill {EPS} is no share of the softmax mass; give a number from 0 up to, but not including, 1",
    "EPS is the part of each query's mass that may be left out.",
)
NEEDS_CPU = Refusal(
    "--shift-sparse-prefill {EPS} needs the CPU platform's attention backend, and this server has {backend} on "
    "{device}; leave it out",
    "No GPU backend measures the mass that it leaves out. Without that, the bound would not hold.",
)
OTHER_MODEL = Refusal(
    "--shift-sparse-prefill {EPS} is not served for {name}, because {reason}; leave it out",
    "It is tested for models that generate text, and whose layers all attend to whole prefixes with separate heads.",
)

FEATURES = (
    Feature("--enable-deterministic-inference", lambda a: a.enable_deterministic_inference,
     "what is left out depends on how a prompt is divided into chunks"),
    Feature("--dcp-size above 1", lambda a: a.dcp_size > 1, "no rank has all keys of a head"),
    Feature("--speculative-algorithm", lambda a: a.speculative_algorithm is not None,
     "a draft model would have other keys than the model"),
    Feature("--disaggregation-mode", lambda a: a.disaggregation_mode not in (None, "null"),
     "the other server would take such keys for exact ones"),
    Feature("--enable-hierarchical-cache", lambda a: a.enable_hierarchical_cache,
     "other servers could take its copies for exact ones"),
    Feature("--enable-lmcache", lambda a: a.enable_lmcache, "other servers could take its copies for exact ones"),
    Feature("--enable-flexkv", lambda a: a.enable_flexkv, "it takes such keys for exact ones"),
    Feature("--radix-cache-backend", lambda a: a.radix_cache_backend, "it could take such keys for exact ones"),
    Feature("--unified-cache-external-linker", lambda a: a.enable_unified_cache_external_linker,
     "it could take such keys for exact ones"),
    Feature("--kv-events-config", lambda a: a.kv_events_config is not None,
     "a router would take such keys for exact ones"),
)  # fmt: skip
FEATURE_CONFLICT = Refusal(
    "{feature} cannot be combined with --shift-sparse-prefill {EPS}: {reason}; leave one of them out",
    "Each of these features has its own reason.",
)


def check_sparse_prefill(settings: Any, model_config: Any, config: ShiftConfig) -> None:
    """Check that prompts of this model can leave out blocks on this server.

    Args:
        settings: A view of the resolved server arguments.
        model_config: SGLang's configuration of the model.
        config: The configuration that follows from the arguments.

    Raises:
        Refused: they cannot; the error has the reason.
    """
    share = config.sparse_prefill
    text = f"{share:g}"
    if not 0 <= share < 1:
        raise NOT_A_SHARE(EPS=text)
    if not share:
        return
    backends = sorted(set(map(str, attention_backends_of(settings))))
    if not uses_shift_cpu_platform() or backends != [ATTENTION]:
        raise NEEDS_CPU(EPS=text, backend=" and ".join(backends), device=settings.device)
    if feature := first_requested(FEATURES, settings):
        raise FEATURE_CONFLICT(feature=feature.name, reason=feature.why, EPS=text)
    name = architecture_of(model_config.hf_config) or "this model"
    if reason := why_exact(model_config, name):
        raise OTHER_MODEL(EPS=text, name=name, reason=reason)


def why_exact(model_config: Any, name: str) -> str | None:
    """Why a model's attention must stay exact, as a clause, or None."""
    if model_config.attention_arch == AttentionArch.MLA:
        return "its latent attention (MLA) has one key for all heads"
    if not model_config.is_generation:
        return "it generates no text"
    return other_layers(model_config, name)
