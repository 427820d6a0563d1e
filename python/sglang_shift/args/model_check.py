"""Refuse a model if its modes are not tested, or if its sizes do not suit P."""

from __future__ import annotations

from typing import Any

from sglang_shift_kernels.layout import SCALE_BYTES

from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.models.decoder_config import text_config_of
from sglang_shift.models.families import FAMILIES, WITH_IMAGES
from sglang_shift.models.fields import check_fields
from sglang_shift.models.heads import Heads

CLASS_DISABLED = Refusal(
    "SGLANG_DISABLED_MODEL_ARCHS={module} keeps SGLang from its own {name}; unset it",
    "SGLang would serve the model by transformers' code, without a word.",
)
OTHER_ATTENTION = Refusal(
    "architecture {name} is not served with sequence parallelism, because {reason}; serve it without --sp-size and "
    "--enable-shift-parallel",
    "The message has the reason.",
)
QUANTIZED = Refusal(
    "weights quantized with {method} are not served with sequence parallelism; serve them without --sp-size and "
    "--enable-shift-parallel, or use another format: [formats](quantization.md)",
    "Their kernels read more than the tensors of a layer: objects at the weights, or shapes from a file.",
)
NOT_TEXT = Refusal(
    "{name} is not served with sequence parallelism, because its answers about images or sounds are not tested; serve "
    "it without --sp-size and --enable-shift-parallel",
    "Only [some models with images](models.md#models-with-images) are tested.",
)
NOT_DETERMINISTIC = Refusal(
    "--enable-deterministic-inference with {name} needs --shift-policy tp, because steps with images run in TP, and "
    "others in SP; add --enable-shift-parallel --shift-policy tp",
    "A prompt without images would have other sums beside a prompt with images than it has alone.",
)
HEADS = Refusal(
    "--tp-size {P} does not divide the model's {N} attention heads; choose a divisor of {N}",
    "Every rank has the same number of heads.",
)
KV_HEADS = Refusal(
    "--tp-size {P} and the model's {N} KV heads do not divide each other; choose another size",
    "KV heads are divided among the ranks, or replicated, evenly.",
)
INTERMEDIATE_SIZE = Refusal(
    "--tp-size {P} does not divide the model's intermediate size {N}",
    "Every rank has an equal part of the MLP.",
)
FP8_WIDTH = Refusal(
    f"--shift-exchange-dtype fp8 takes a multiple of {SCALE_BYTES} columns, and with --tp-size {{P}} a rank has {{N}} "
    "of {projection}; give auto",
    "The scales behind the columns must stay aligned.",
)

IGNORED_FIELDS: dict[str, dict[str, Any]] = {
    name: {"decoder_sparse_step": 1, "mlp_only_layers": []}
    for name in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration")
}
"""By architecture outside of the families, fields that SGLang's class ignores, and the values that change nothing."""
IGNORED = Refusal(
    "config.json has {field} {value}, which SGLang's {name} ignores, so its answers would be wrong; serve another "
    "checkpoint",
    "Qwen2-MoE and Qwen3-MoE with some dense layers have such a field.",
)
NOT_SHARED = frozenset(("bitsandbytes", "gguf"))
"""Formats whose shards cannot be stacked. After loading, the rank checks the layers."""
SPARSE_ATTENTION = frozenset(
    ("DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "GlmMoeDsaForCausalLM", "MiniMaxM3ForCausalLM")
)
"""Architectures with an indexer. A field of ``config.json`` names most others."""
OWN_SEQUENCE_PARALLELISM = frozenset(("MuseSparkForConditionalGeneration",))
STACKED_STREAMS = frozenset(("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"))


def check_registry(name: str) -> None:
    """Check that SGLang may import its own class of the model. After loading, the rank checks the class again.

    Raises:
        Refused: SGLang may not, and would silently serve the model by transformers' code.
    """
    from sglang.srt.environ import envs

    module = FAMILIES[name].module
    if module in envs.SGLANG_DISABLED_MODEL_ARCHS.get():
        raise CLASS_DISABLED(module=module, name=name)


def why_not_served(hf_config: Any, name: str) -> str | None:
    """Why no SP step can serve an architecture, as a clause, or None. The rank checks the layers after loading."""
    if name in OWN_SEQUENCE_PARALLELISM:
        return "its class in SGLang shards tokens in its own way"
    if name in STACKED_STREAMS:
        return "its layers keep several streams in one tensor, whose first dimension is not the tokens"
    if getattr(hf_config, "index_topk", None) is not None or name in SPARSE_ATTENTION:
        return "its sparse attention chooses tokens by the hidden states of all tokens"
    return None


def check_ignored_fields(hf_config: Any, name: str) -> None:
    """Check the fields that SGLang's class is known to ignore.

    Raises:
        Refused: such a field changes what the model computes.
    """
    for field, neutral in IGNORED_FIELDS.get(name, {}).items():
        value = getattr(text_config_of(hf_config), field, None)
        if value is not None and value != neutral:
            raise IGNORED(field=field, value=value, name=name)


def check_model(model_config: Any, config: ShiftConfig, deterministic: bool = False) -> None:
    """Check that every mode can serve the model, with its sizes.

    Args:
        model_config: SGLang's configuration of the model.
        config: Our configuration.
        deterministic: Whether an answer must not depend on the requests beside it.

    Raises:
        Refused: a mode cannot; the error has the reason.
    """
    hf_config = model_config.hf_config
    name = (getattr(hf_config, "architectures", None) or ["unknown"])[0]
    if reason := why_not_served(hf_config, name):
        raise OTHER_ATTENTION(name=name, reason=reason)
    check_ignored_fields(hf_config, name)
    if name in FAMILIES:
        check_registry(name)
    if model_config.quantization in NOT_SHARED:
        raise QUANTIZED(method=model_config.quantization)
    if model_config.is_multimodal and name not in WITH_IMAGES:
        raise NOT_TEXT(name=name)
    if model_config.is_multimodal and deterministic and config.policy != "tp":
        raise NOT_DETERMINISTIC(name=name)
    if name in FAMILIES:
        check_fields(hf_config, model_config.context_len)
    world_size = config.world_size
    heads = Heads(model_config.num_attention_heads, model_config.get_total_num_kv_heads())
    if not heads.divides_queries(world_size):
        raise HEADS(P=world_size, N=heads.query)
    if not heads.divides_kv(world_size):
        raise KV_HEADS(P=world_size, N=heads.kv)
    intermediate = getattr(text_config_of(hf_config), "intermediate_size", None)
    if isinstance(intermediate, int) and intermediate % world_size:
        raise INTERMEDIATE_SIZE(P=world_size, N=intermediate)
    if config.exchange_dtype == "fp8" and not hasattr(hf_config, "kv_lora_rank"):
        shard = heads.of_rank(world_size)
        for projection, count in (("QKV", shard.qkv), ("O", shard.query)):
            width = count * model_config.head_dim
            if width % SCALE_BYTES:
                raise FP8_WIDTH(P=world_size, N=width, projection=projection)
