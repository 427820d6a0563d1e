"""What is not served, and why: features of SGLang that do not combine, flags that contradict each other, models.

``python -m sglang_shift.args refusals`` prints ``docs/refusals.md`` from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_shift_kernels.layout import SCALE_BYTES

from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.flags import BY_NAME, FLAGS, LIVE_NUMBERS, POLICIES, Need
from sglang_shift.models.fields import MODELS, check_fields
from sglang_shift.policy.builtin import load_policy

ARCHITECTURES = tuple(MODELS)


class Feature(NamedTuple):
    """A feature of SGLang's that does not combine with sequence parallelism.

    Attributes:
        name: What the user asks for.
        asked: Whether these settings ask for it.
        why: Why it cannot be served.
    """

    name: str
    asked: Callable[[Any], bool]
    why: str


FEATURES = (
    Feature("--pp-size > 1", lambda a: a.pp_size > 1,
     "the token-sharded residual stream does not cross pipeline stages"),
    Feature("attention DP", lambda a: a.attn_dp_size > 1 or a.enable_dp_attention,
     "its ranks hold the KV cache of different requests"),
    Feature("--dcp-size > 1", lambda a: a.dcp_size > 1, "it shards the KV cache over tokens"),
    Feature("context parallelism", lambda a: a.attn_cp_size > 1 or a.enable_prefill_cp,
     "it shards the sequence in its own layout"),
    Feature("--enable-layernorm-sp", lambda a: a.enable_layernorm_sp, "sglang_shift uses the same seam"),
    Feature("--enable-attn-tp-input-scattered, --enable-dense-mlp-attn-tp or --moe-dense-tp-size",
     lambda a: a.enable_attn_tp_input_scattered or a.enable_dense_mlp_attn_tp or a.moe_dense_tp_size is not None,
     "they lay out the rows of a layer in their own way"),
    Feature("expert parallelism", lambda a: a.ep_size > 1 or a.moe_a2a_backend not in (None, "none"),
     "mixture-of-experts models are not served yet"),
    Feature("--enable-two-batch-overlap or --enable-single-batch-overlap",
     lambda a: a.enable_two_batch_overlap or a.enable_single_batch_overlap, "a step has one token-sharded region"),
    Feature("--enable-pdmux", lambda a: a.enable_pdmux, "it runs two batches at once"),
    Feature("--disaggregation-mode", lambda a: a.disaggregation_mode not in (None, "null"),
     "it has not been verified yet"),
    Feature("speculative decoding", lambda a: a.speculative_algorithm is not None, "it has not been verified yet"),
    Feature("LoRA", lambda a: bool(a.enable_lora or a.lora_paths),
     "SGLang's LoRA layers read TP shards of the weights"),
    Feature("--quantization or --torchao-config",
     lambda a: a.quantization is not None or bool(getattr(a, "torchao_config", "")),
     "quantized weights are not assembled yet"),
    Feature("--enable-torch-compile", lambda a: a.enable_torch_compile, "compiled code is keyed by shape, not by mode"),
    Feature("--cuda-graph-backend-prefill full",
     lambda a: getattr(getattr(a.cuda_graph_config, "prefill", None), "backend", None) == "full",
     "attention backends size its workspace for the graphs of one mode"),
    Feature("--debug-cuda-graph", lambda a: a.debug_cuda_graph, "it runs a step's Python again inside the step"),
    Feature("--dllm-algorithm", lambda a: a.dllm_algorithm is not None, "diffusion models are not served"),
    Feature("--elastic-ep-backend", lambda a: a.elastic_ep_backend is not None, "ranks must not come and go"),
    Feature("--use-ray", lambda a: a.use_ray, "its actors build SGLang's own scheduler"),
    Feature("--encoder-only", lambda a: a.encoder_only, "an encoder has no steps to shift"),
    Feature("gRPC serving", lambda a: a.smg_grpc_mode or a.grpc_mode, "it starts SGLang's own scheduler"),
    Feature("--weight-cache-mode", lambda a: a.weight_cache_mode != "off",
     "it shares the stock shards between processes"),
    Feature("--startup-weight-load-mode", lambda a: a.startup_weight_load_mode not in (None, "serial"),
     "base weights are assembled right after loading"),
    Feature("--load-format sharded_state or remote_instance",
     lambda a: a.load_format in ("sharded_state", "remote_instance"), "it copies whole parameter buffers"),
    Feature("--remote-instance-weight-loader-start-seed-via-transfer-engine",
     lambda a: a.remote_instance_weight_loader_start_seed_via_transfer_engine,
     "it publishes whole parameter buffers"),
    Feature("--enable-memory-saver without CUDA", lambda a: a.enable_memory_saver and a.device != "cuda",
     "SGLang's memory saver releases GPU memory"),
    Feature("weight offloading", lambda a: a.cpu_offload_gb > 0 or a.offload_group_size > 0,
     "SP mode reads the base weights in place"),
    Feature("--is-embedding", lambda a: a.is_embedding,
     "models with a pooler have no exit from the token-sharded region"),
    Feature("--model-impl transformers or mindspore", lambda a: a.model_impl in ("transformers", "mindspore"),
     "its layers have no boundaries"),
    Feature("--enable-deterministic-inference with switching",
     lambda a: a.enable_deterministic_inference and a.enable_shift_parallel and a.shift_policy not in ("tp", "sp"),
     "sums are ordered differently in the two modes; add --shift-policy tp or sp"),
    Feature("--rl-on-policy-target", lambda a: a.rl_on_policy_target is not None, "sums must be those of the trainer"),
    Feature("auxiliary hidden states", lambda a: a.enable_return_aux_hidden_states, "they are not gathered yet"),
    Feature("--enable-mscclpp with --enable-symm-mem", lambda a: a.enable_mscclpp and a.enable_symm_mem,
     "MSCCL++ then takes every buffer for symmetric memory, and those of SP steps are not"),
    Feature("megakernels", lambda a: a.enable_nvidia_megakernel or a.enable_amd_monokernel,
     "they replace the linears that SP mode runs through"),
)  # fmt: skip
FEATURE = Refusal(
    "{FEATURE} cannot be combined with sequence parallelism: {REASON}; leave one of them out",
    "Each of these features has its own reason.",
)

NEEDS_SWITCHING = Refusal(
    "{FLAG} {VALUE} needs --enable-shift-parallel; without it no step is switched",
    "These are settings of the policy: " + ", ".join(f.option for f in FLAGS if f.need is Need.SWITCHING) + ".",
)
NEEDS_SP = Refusal(
    "{FLAG} {VALUE} needs --sp-size or --enable-shift-parallel; without them {REASON}",
    "These are settings of SP mode: " + ", ".join(f.option for f in FLAGS if f.need is Need.SP) + ".",
)
NEGATIVE = Refusal("{FLAG} {VALUE} must be 0 or more", "It is a number of tokens, of requests or of graphs.")
NOT_OF_THE_POLICY = Refusal(
    "{FLAG} {VALUE} has no meaning with --shift-policy {NAME}; leave it out, or give --shift-policy {POLICIES}",
    "Other policies do not use this number.",
)
LEAVES_ABOVE_ENTER = Refusal(
    "{LEAVE_FLAG} {N} must not be above {ENTER_FLAG} {M}",
    "The queue cannot be short again while it is still deep.",
)
UNKNOWN_POLICY = Refusal(
    "--shift-policy {NAME} is unknown; choose from {POLICIES}, or give module:Class",
    "Nothing would choose the modes.",
)
NO_CALIBRATION = Refusal(
    "--shift-policy calibrated needs a calibration; leave out --shift-calibration off",
    "The policy compares step times, and the calibration is where they come from.",
)
CALIBRATION_UNUSED = Refusal(
    "--shift-calibration {VALUE} has no meaning with --shift-policy {NAME}; leave one out",
    "Only the policy calibrated uses step times.",
)
ONE_RANK = Refusal(
    "--tp-size {P} leaves nothing to shift; give --tp-size 2 or more",
    "A step cannot be divided among fewer than 2 ranks.",
)
NO_SP = Refusal(
    "--sp-size {S} is not sequence parallelism; give 2 or more, or leave it out",
    "S ranks share the tokens of a step.",
)
NOT_A_DIVISOR = Refusal(
    "--sp-size {S} does not divide --tp-size {P}; choose a divisor of it",
    "The base configuration is SP = S, TP = P/S.",
)

CLASS_DISABLED = Refusal(
    "SGLANG_DISABLED_MODEL_ARCHS={MODULE} keeps SGLang from its own {ARCHITECTURE}; unset it",
    "SGLang would serve the model by transformers' code, without a word.",
)
ARCHITECTURE = Refusal(
    "architecture {ARCHITECTURE} is not served with sequence parallelism; these are: {ARCHITECTURES}",
    f"Every mode is tested for {', '.join(ARCHITECTURES)}. For others it is not.",
)
QUANTIZED = Refusal(
    "quantized weights ({METHOD}) are not served with sequence parallelism yet; use an unquantized checkpoint",
    "Quantized weights are not assembled yet.",
)
NOT_TEXT = Refusal(
    "{ARCHITECTURE} is served for text generation only",
    "Embedding and multimodal models are not tested.",
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
    "of {PROJECTION}; give auto",
    "The scales behind the columns must stay aligned.",
)


def check_flags(settings: Any) -> None:
    """Check the flags against each other; ``settings`` is a view of the resolved server arguments.

    Raises:
        Refused: with the reason.
    """
    switching, sp_size, world_size = settings.enable_shift_parallel, settings.sp_size, settings.tp_size
    given = [(flag, getattr(settings, flag.name)) for flag in FLAGS if getattr(settings, flag.name) is not None]
    for flag, value in given:
        if flag.need is Need.SWITCHING and not switching:
            raise NEEDS_SWITCHING(FLAG=flag.option, VALUE=value)
    if not switching and sp_size is None:
        for flag, value in given:
            if flag.need is Need.SP:
                raise NEEDS_SP(FLAG=flag.option, VALUE=value, REASON=flag.without)
        return
    if settings.shift_graph_buckets is not None and settings.shift_graph_buckets < 0:
        raise NEGATIVE(FLAG="--shift-graph-buckets", VALUE=settings.shift_graph_buckets)
    check_policy(settings)
    if world_size < 2:
        raise ONE_RANK(P=world_size)
    if sp_size is not None and sp_size < 2:
        raise NO_SP(S=sp_size)
    if sp_size is not None and world_size % sp_size:
        raise NOT_A_DIVISOR(S=sp_size, P=world_size)
    for feature in FEATURES:
        if feature.asked(settings):
            raise FEATURE(FEATURE=feature.name, REASON=feature.why)


def check_policy(settings: Any) -> None:
    """Check the flags of the policy against each other.

    Raises:
        Refused: with the reason.
    """
    policy, calibration = settings.shift_policy, settings.shift_calibration
    numbers = {flag.name: getattr(settings, flag.name) for flag in LIVE_NUMBERS}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    for name, value in numbers.items():
        flag = BY_NAME[name]
        if value < 0:
            raise NEGATIVE(FLAG=flag.option, VALUE=value)
        if policy not in flag.policies and not (policy is None and name == "shift_threshold"):
            raise NOT_OF_THE_POLICY(
                FLAG=flag.option, VALUE=value, NAME=policy or "calibrated", POLICIES=" or ".join(flag.policies)
            )
    for what in ("requests", "tokens"):
        enter, leave = BY_NAME[f"shift_enter_{what}"], BY_NAME[f"shift_leave_{what}"]
        low, high = (numbers.get(flag.name, getattr(ShiftConfig, flag.setting)) for flag in (leave, enter))
        if low > high:
            raise LEAVES_ABOVE_ENTER(LEAVE_FLAG=leave.option, N=low, ENTER_FLAG=enter.option, M=high)
    if policy is not None and policy not in POLICIES:
        if ":" not in policy:
            raise UNKNOWN_POLICY(NAME=policy, POLICIES=", ".join(POLICIES))
        load_policy(policy)
    if policy == "calibrated" and calibration == "off":
        raise NO_CALIBRATION()
    if calibration not in (None, "auto", "off") and policy not in (None, "calibrated"):
        raise CALIBRATION_UNUSED(VALUE=calibration, NAME=policy)


def check_registry(name: str) -> None:
    """Check that SGLang may import its own class; the rank checks which one it loaded.

    Raises:
        Refused: it may not, and would serve the model by transformers' code without a word.
    """
    from sglang.srt.environ import envs

    module = MODELS[name].native.partition(":")[0]
    if module in envs.SGLANG_DISABLED_MODEL_ARCHS.get():
        raise CLASS_DISABLED(MODULE=module, ARCHITECTURE=name)


def check_model(model_config: Any, config: ShiftConfig) -> None:
    """Check that the model is one that every mode serves, at this size.

    Raises:
        Refused: with the reason.
    """
    hf_config = model_config.hf_config
    name = (getattr(hf_config, "architectures", None) or ["unknown"])[0]
    if name not in ARCHITECTURES:
        raise ARCHITECTURE(ARCHITECTURE=name, ARCHITECTURES=", ".join(ARCHITECTURES))
    check_registry(name)
    if model_config.quantization is not None or getattr(hf_config, "quantization_config", None):
        raise QUANTIZED(METHOD=model_config.quantization or "quantization_config")
    if not model_config.is_generation or model_config.is_multimodal:
        raise NOT_TEXT(ARCHITECTURE=name)
    check_fields(hf_config, model_config.context_len)
    world_size = config.world_size
    heads, kv_heads = model_config.num_attention_heads, model_config.get_total_num_kv_heads()
    if heads % world_size:
        raise HEADS(P=world_size, N=heads)
    if kv_heads % world_size and world_size % kv_heads:
        raise KV_HEADS(P=world_size, N=kv_heads)
    intermediate = hf_config.intermediate_size
    if intermediate % world_size:
        raise INTERMEDIATE_SIZE(P=world_size, N=intermediate)
    if config.exchange_dtype == "fp8":
        queries = heads // world_size * model_config.head_dim
        qkv = queries + 2 * max(1, kv_heads // world_size) * model_config.head_dim
        for projection, width in (("QKV", qkv), ("O", queries)):
            if width % SCALE_BYTES:
                raise FP8_WIDTH(P=world_size, N=width, PROJECTION=projection)
