"""Check the flags of instances: ``--instances`` and those that need it."""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.model_config import AttentionArch

from sglang_shift.args.feature import Feature, first_requested, uses_lora
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.flags import AUTO
from sglang_shift.instances.levels import Levels
from sglang_shift.models.decoder_config import architecture_of, text_config_of

NOT_INSTANCES = Refusal(
    "--instances {N} does not divide --tp-size {P} into at least 2 instances of equal size; give a power of two, 2 to "
    "{P}, with --tp-size a power of two",
    "An instance merges with its neighbour of the same size.",
)
MERGE_LEVELS = Refusal(
    "--merge-levels {value} is not possible: {reason}; give numbers of ranks with commas between them, such as "
    "{example}",
    "Merged instances have a power of two of ranks, more than at the start and at most P.",
)
SP_SIZE = Refusal(
    "--sp-size {S} cannot be combined with --instances {N}, because each of them must hold the whole weights; give "
    "--sp-size {N} or more, a power of two, or leave it out",
    "P/S ranks hold the whole weights together. The smallest instances have P/N ranks.",
)
AUTO_NEEDS_TIMES = Refusal(
    "--instance-policy auto needs step times, and --shift-policy {policy} has none; give --enable-shift-parallel with "
    "--shift-policy calibrated, and leave out --shift-calibration off",
    "The policy [compares layouts](instances.md#when-to-merge-and-to-split) by the step times of each level.",
)
FREE_IN_SP = Refusal(
    "--merge-weights free cannot be combined with {flag}, because merged instances then have no weights for SP; leave "
    "one of them out",
    "TP needs only a rank's own shards, and the memory of the others goes to the KV cache.",
)
MODEL = Refusal(
    "--instances {N} is not served for {name}, because {reason}; leave it out",
    "Skins and KV caches of levels are for dense models with keys and values of each head.",
)
KV_HEADS = Refusal(
    "--instances {N} needs at least one KV head for each of the {P} ranks, but the model has {H}; give a smaller "
    "--tp-size",
    "A merge beyond the KV heads would gain no memory.",
)

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of ``config.json`` with a number of experts."""

FEATURES = (
    Feature("--dp-size > 1", lambda a: a.dp_size > 1, "instances are replicas already; give --instances alone"),
    Feature("--nnodes > 1", lambda a: a.nnodes > 1, "ranks of other nodes have no sockets to the controller"),
    Feature("--load-balance-method other than auto and round_robin",
     lambda a: a.load_balance_method not in ("auto", "round_robin"),
     "the controller of instances sends a request where it fits, by a rule of its own"),
    Feature("--dcp-size > 1", lambda a: a.dcp_size not in (1, None), "such a cache is divided by token, not by head"),
    Feature("--ep-size > 1", lambda a: a.ep_size > 1, "only dense models are served"),
    Feature("--enable-hierarchical-cache", lambda a: a.enable_hierarchical_cache,
     "its copies on the host belong to one level"),
    Feature("--device other than cpu", lambda a: a.device != "cpu",
     "merges and splits have never run on a GPU"),
    Feature("--enable-deterministic-inference", lambda a: a.enable_deterministic_inference,
     "sums are ordered differently at each level, so sampling with a seed would give other tokens after a change"),
    Feature("--disable-radix-cache", lambda a: a.disable_radix_cache,
     "the KV cache of running requests moves as cached prefixes"),
    Feature("--radix-cache-backend", lambda a: a.radix_cache_backend, "instances have a prefix cache of their own"),
    Feature("--enable-lmcache", lambda a: a.enable_lmcache, "its copies belong to one level"),
    Feature("--enable-hisparse", lambda a: a.enable_hisparse, "its copies on the host belong to one level"),
    Feature("--enable-unified-memory", lambda a: a.enable_unified_memory, "its pool moves pages by itself"),
    Feature("--enable-kv-cache-sharding", lambda a: a.enable_kv_cache_sharding, "it divides the cache by page"),
    Feature("--kv-cache-dtype other than auto", lambda a: a.kv_cache_dtype not in (None, "auto"),
     "a cache with scales of its own cannot change its level"),
    Feature("--enable-lora", uses_lora, "the adapters have the shapes of one level"),
    Feature("--speculative-algorithm", lambda a: a.speculative_algorithm is not None,
     "the draft model has the shapes of one level"),
    Feature("--disaggregation-mode", lambda a: a.disaggregation_mode not in (None, "null"),
     "the transfer of a cache is arranged for one level"),
    Feature("--enable-streaming-session or --enable-session-radix-cache",
     lambda a: a.enable_streaming_session or a.enable_session_radix_cache,
     "the requests of a session must stay on one instance"),
    Feature("--enable-memory-saver", lambda a: a.enable_memory_saver, "views of the memory are kept at several levels"),
    Feature("--enable-prefill-delayer", lambda a: a.enable_prefill_delayer, "it keeps the groups of one level"),
    Feature("--kv-events-config", lambda a: a.kv_events_config, "the pages of a cache get other numbers in a merge"),
    Feature("--skip-tokenizer-init", lambda a: a.skip_tokenizer_init,
     "tokens would then pass through the controller"),
    Feature("--shift-tbt-target with --merge-weights free",
     lambda a: a.shift_tbt_target and a.merge_weights == "free",
     "merged instances then run all steps in TP, and their step times are not measured"),
    Feature("--shift-sparse-prefill", lambda a: a.shift_sparse_prefill,
     "what a request has left out is not sent to the ranks that go on with it"),
    Feature("--strip-thinking-cache", lambda a: a.strip_thinking_cache,
     "the tokens that a request has generated move as cached prefixes"),
)  # fmt: skip
FEATURE_CONFLICT = Refusal(
    "{feature} cannot be combined with --instances {N}: {reason}; leave one of them out",
    "Each of these features has its own reason.",
)


def check_instances(settings: Any, config: ShiftConfig) -> None:
    """Check the flags of instances against each other and against SGLang's.

    Args:
        settings: A view of the resolved server arguments.
        config: The configuration that follows from them.

    Raises:
        Refused: the flags do not combine; the error has the reason.
    """
    count, world_size = settings.instances, config.world_size
    if count is None:
        return
    if not (_is_power(world_size) and _is_power(count) and 2 <= count <= world_size):
        raise NOT_INSTANCES(N=count, P=world_size)
    try:
        Levels.of_flags(world_size, count, config.merge_levels)
    except ValueError as error:
        raise MERGE_LEVELS(value=config.merge_levels, reason=error, example=world_size) from None
    if config.sp_size < count or not _is_power(config.sp_size):
        raise SP_SIZE(S=config.sp_size, N=count)
    if config.instance_policy == AUTO and config.calibration == "off":
        raise AUTO_NEEDS_TIMES(policy=config.policy)
    if config.merge_weights == "free":
        if config.policy == "sp":
            raise FREE_IN_SP(flag="--shift-policy sp" if config.switching else "--sp-size")
        if config.instance_policy == AUTO:
            raise FREE_IN_SP(flag="--instance-policy auto")
    if feature := first_requested(FEATURES, settings):
        raise FEATURE_CONFLICT(feature=feature.name, reason=feature.why, N=count)


def divisible_tokens(tokens: int, page_size: int, instances: int) -> int:
    """The size of the largest KV cache, of at most ``tokens``, that the instances of a split can divide into pages.

    Together with the page that holds no tokens, its pages are a multiple of the instances.

    Args:
        tokens: The tokens of the cache of all ranks together, without that page.
        page_size: Tokens in a page.
        instances: The number of the smallest instances.
    """
    pages = (tokens + page_size) // page_size // instances * instances
    return (pages - 1) * page_size


def pool_fields(settings: Any, config: ShiftConfig) -> dict[str, int]:
    """The size of the KV cache, by the name of its flag, if instances need another one than the settings have."""
    if not config.instances or settings.max_total_tokens is None:
        return {}
    tokens = divisible_tokens(settings.max_total_tokens, settings.page_size or 1, config.instances)
    return {"max_total_tokens": tokens}


def check_instance_model(model_config: Any, config: ShiftConfig) -> None:
    """Check that the instances of a server can share this model.

    Raises:
        Refused: they cannot; the error has the reason.
    """
    if not config.instances:
        return
    if reason := why_not_shared(model_config):
        name = architecture_of(model_config.hf_config) or "this model"
        raise MODEL(N=config.instances, name=name, reason=reason)
    heads = model_config.get_total_num_kv_heads()
    if heads < config.world_size:
        raise KV_HEADS(N=config.instances, P=config.world_size, H=heads)


def why_not_shared(model_config: Any) -> str | None:
    """Why instances cannot share a model, as a clause, or None. The ranks check the layers after loading."""
    text = text_config_of(model_config.hf_config)
    reasons = {
        f"its weights are quantized ({model_config.quantization})": model_config.quantization is not None,
        "its attention has latents in place of keys and values (MLA)": model_config.attention_arch == AttentionArch.MLA,
        "it has experts": any(getattr(text, name, None) for name in EXPERTS),
        "it has layers with a sliding window": getattr(model_config, "is_hybrid_swa", False),
        "its answers about images or sounds are not tested with instances": model_config.is_multimodal,
        "it generates no text": not model_config.is_generation,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _is_power(number: int) -> bool:
    return number > 0 and not number & (number - 1)
