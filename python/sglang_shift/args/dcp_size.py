"""Choose and check D, SGLang's ``--dcp-size``: the number of ranks that divide the tokens of a KV cache."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.arg_groups.overrides import attention_backends_of, declare_resolution, model_config_of, resolving_view
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.utils import is_cuda

from sglang_shift.args.feature import Feature, first_requested
from sglang_shift.args.sp_size import uses_shift_cpu_platform
from sglang_shift.errors import Refusal
from sglang_shift.flags import AUTO
from sglang_shift.models.decoder_config import architecture_of
from sglang_shift.models.heads import Heads
from sglang_shift.models.token_shards import check_latent_shards, check_token_shards, most_token_shards
from sglang_shift.models.whole_prefixes import other_layers

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "fa3")
"""The attention backends that have token shards: SGLang's Triton backend on a GPU, ours on a CPU, where it has the same
name, and ours with FlashAttention 3 on GPUs of NVIDIA."""

OWN_DTYPES = ("auto", "bf16", "bfloat16")
"""The values of --kv-cache-dtype that leave keys as the model computes them."""

NOT_A_COUNT = Refusal(
    "--dcp-size {value} is neither a whole number of ranks nor 'auto'",
    "The value is an int or 'auto', from Python too.",
)
NEEDS_SP = Refusal(
    "--dcp-size auto needs --sp-size or --enable-shift-parallel; without them give a number",
    "Without our flags all is stock SGLang, and SGLang takes numbers only.",
)
OTHER_BACKEND = Refusal(
    "--dcp-size {D} needs --attention-backend triton, or fa3 on GPUs of NVIDIA, for prefills and decodes alike, and "
    "the attention backend is {backend}; give one of them, or leave --dcp-size out",
    "Other backends write each token on all ranks, at places that other tokens have, and SGLang does not refuse it. "
    "Two backends over one divided cache have not been tested.",
)
OTHER_CACHE = Refusal(
    "--kv-cache-dtype {dtype} is not served with --dcp-size {D} and --attention-backend fa3; leave it out, or give "
    "--attention-backend triton",
    "FlashAttention 3 wants queries of 8 bits for a cache of 8 bits, and these are not scaled here.",
)
LATENTS = Refusal(
    "--dcp-size {D} is not served with latent attention (MLA) on GPUs, as in {name}; leave it out",
    "SGLang's Triton backend has no code for it. The backends that have it have not been tested with SP steps.",
)
OTHER_LAYERS = Refusal(
    "--dcp-size {D} is not served for {name}, because {reason}; leave it out",
    "Layers with a sliding window, with a state in place of keys or with an encoder's keys have caches of their own, "
    "which SGLang does not divide.",
)

FEATURES = (
    Feature("--enable-hierarchical-cache", lambda a: a.enable_hierarchical_cache,
     "its copies on the host are not divided by token"),
    Feature("--enable-lmcache", lambda a: a.enable_lmcache, "its copies are not divided by token"),
    Feature("--enable-flexkv", lambda a: a.enable_flexkv, "its copies are not divided by token"),
    Feature("--radix-cache-backend", lambda a: a.radix_cache_backend, "it could copy rows of other tokens"),
    Feature("--unified-cache-external-linker", lambda a: a.enable_unified_cache_external_linker,
     "it could copy rows of other tokens"),
    Feature("--enable-hisparse", lambda a: a.enable_hisparse, "its copies on the host are not divided by token"),
    Feature("--enable-unified-memory", lambda a: a.enable_unified_memory, "its pool is divided for MLA only"),
    Feature("--enable-kv-cache-sharding", lambda a: a.enable_kv_cache_sharding, "it divides the same pool by page"),
    Feature("--kv-cache-dtype with 4 bits", lambda a: str(a.kv_cache_dtype).startswith(("fp4", "nvfp4", "mxfp4")),
     "SGLang cannot write single tokens of such a cache"),
    Feature("--enable-deterministic-inference", lambda a: a.enable_deterministic_inference,
     "the sums of attention are ordered by rank"),
    Feature("--speculative-algorithm", lambda a: a.speculative_algorithm is not None,
     "drafts are verified with a mask, and their keys move between slots"),
    Feature("--disaggregation-mode", lambda a: a.disaggregation_mode not in (None, "null"),
     "the transfer of such a cache has not been tested"),
)  # fmt: skip
FEATURE_CONFLICT = Refusal(
    "{feature} cannot be combined with --dcp-size {D}: {reason}; leave one of them out",
    "Each of these features has its own reason.",
)


def resolve_dcp_size(server_args: Any, *, uses_sp: bool) -> None:
    """Replace ``auto`` by the number of ranks that hold the same KV heads or latents, and check other features.

    SGLang's own checks compare the number, so this comes before them.

    Raises:
        Refused: the value is not possible, or a feature does not combine with it.
    """
    settings = resolving_view(server_args)
    count = settings.dcp_size
    if count != AUTO and (not isinstance(count, int) or isinstance(count, bool)):
        raise NOT_A_COUNT(value=repr(count))
    if count == AUTO:
        if not uses_sp:
            raise NEEDS_SP()
        count, why = largest(model_config_of(server_args), settings.tp_size)
        declare_resolution(server_args, "sglang_shift", dcp_size=count)
        logger.info("sglang_shift: --dcp-size auto: D=%d%s", count, why)
    if uses_sp and count > 1 and (feature := first_requested(FEATURES, settings)):
        raise FEATURE_CONFLICT(feature=feature.name, reason=feature.why, D=count)


def largest(model_config: Any, ranks: int) -> tuple[int, str]:
    """Return the largest D that is served with this number of ranks, and why, as the end of a sentence."""
    if model_config.attention_arch != AttentionArch.MLA:
        return most_token_shards(heads_of(model_config), ranks), " is the number of ranks that hold the same KV head"
    if not uses_shift_cpu_platform():
        return 1, ", because latents are not divided on GPUs"
    return ranks, ", because all ranks hold the same latents"


def heads_of(model_config: Any) -> Heads:
    """The heads of a model that has no latents."""
    return Heads(model_config.num_attention_heads, model_config.get_total_num_kv_heads())


def check_dcp_size(settings: Any, model_config: Any) -> None:
    """Check that ranks can divide the tokens of this model's KV cache.

    Args:
        settings: A view of the resolved server arguments.
        model_config: SGLang's configuration of the model.

    Raises:
        Refused: they cannot, or the attention backend would not.
    """
    count = settings.dcp_size
    if count == 1:
        return
    name = architecture_of(model_config.hf_config) or "this model"
    if model_config.attention_arch != AttentionArch.MLA:
        check_token_shards(heads_of(model_config), settings.tp_size, count)
    elif uses_shift_cpu_platform():
        check_latent_shards(settings.tp_size, count)
    else:
        raise LATENTS(D=count, name=name)
    if reason := other_layers(model_config, name):
        raise OTHER_LAYERS(D=count, name=name, reason=reason)
    backends = sorted({str(backend) for backend in attention_backends_of(settings)})
    if len(backends) > 1 or backends[0] not in backends_here():
        raise OTHER_BACKEND(D=count, backend=" and ".join(backends))
    if backends == ["fa3"] and settings.kv_cache_dtype not in OWN_DTYPES:
        raise OTHER_CACHE(dtype=settings.kv_cache_dtype, D=count)


def backends_here() -> tuple[str, ...]:
    """The attention backends that have token shards on this device."""
    return BACKENDS if is_cuda() else BACKENDS[:1]
