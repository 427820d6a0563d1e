"""What is not served, and why. An explicit allowlist of models, a list of features that do not combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_shift_kernels.layout import SCALE_BYTES

from sglang_shift.config import QUEUE_FIELDS, ShiftConfig, policies_using
from sglang_shift.errors import Refused
from sglang_shift.models.families import FAMILIES
from sglang_shift.models.fields import check_fields
from sglang_shift.models.heads import Heads
from sglang_shift.policy.builtin import POLICIES, QueueDepth, load_policy

POLICY_FIELDS = ("shift_policy", "shift_threshold", *("shift_" + name for name in QUEUE_FIELDS), "shift_calibration")

SP_FIELDS = {
    "shift_exchange": "nothing is exchanged",
    "shift_exchange_dtype": "nothing is exchanged",
    "shift_graph_buckets": "no step is in SP",
}
"""Settings of SP mode, which need no switching; why they are pointless without it."""

# (what the user asked for, whether these settings ask for it, why it cannot be served)
FEATURES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("--pp-size > 1", lambda a: a.pp_size > 1, "the token-sharded residual stream does not cross pipeline stages"),
    ("attention DP", lambda a: a.attn_dp_size > 1 or a.enable_dp_attention,
     "its ranks hold the KV cache of different requests"),
    ("--dcp-size > 1", lambda a: a.dcp_size > 1, "it shards the KV cache over tokens"),
    ("context parallelism", lambda a: a.attn_cp_size > 1 or a.enable_prefill_cp,
     "it shards the sequence in its own layout"),
    ("--enable-layernorm-sp", lambda a: a.enable_layernorm_sp, "sglang_shift uses the same seam"),
    ("--enable-attn-tp-input-scattered, --enable-dense-mlp-attn-tp or --moe-dense-tp-size",
     lambda a: a.enable_attn_tp_input_scattered or a.enable_dense_mlp_attn_tp or a.moe_dense_tp_size is not None,
     "they lay out the rows of a layer in their own way"),
    ("expert parallelism", lambda a: a.ep_size > 1 or a.moe_a2a_backend not in (None, "none"),
     "mixture-of-experts models are not served yet"),
    ("--enable-two-batch-overlap or --enable-single-batch-overlap",
     lambda a: a.enable_two_batch_overlap or a.enable_single_batch_overlap, "a step has one token-sharded region"),
    ("--enable-pdmux", lambda a: a.enable_pdmux, "it runs two batches at once"),
    ("--disaggregation-mode", lambda a: a.disaggregation_mode not in (None, "null"), "it has not been verified yet"),
    ("speculative decoding", lambda a: a.speculative_algorithm is not None, "it has not been verified yet"),
    ("LoRA", lambda a: bool(a.enable_lora or a.lora_paths), "SGLang's LoRA layers read TP shards of the weights"),
    ("--quantization or --torchao-config",
     lambda a: a.quantization is not None or bool(getattr(a, "torchao_config", "")),
     "quantized weights are not assembled yet"),
    ("--enable-torch-compile", lambda a: a.enable_torch_compile, "compiled code is keyed by shape, not by mode"),
    ("--cuda-graph-backend-prefill full",
     lambda a: getattr(getattr(a.cuda_graph_config, "prefill", None), "backend", None) == "full",
     "attention backends size its workspace for the graphs of one mode"),
    ("--debug-cuda-graph", lambda a: a.debug_cuda_graph, "it runs a step's Python again inside the step"),
    ("--dllm-algorithm", lambda a: a.dllm_algorithm is not None, "diffusion models are not served"),
    ("--elastic-ep-backend", lambda a: a.elastic_ep_backend is not None, "ranks must not come and go"),
    ("--use-ray", lambda a: a.use_ray, "its actors build SGLang's own scheduler"),
    ("--encoder-only", lambda a: a.encoder_only, "an encoder has no steps to shift"),
    ("gRPC serving", lambda a: a.smg_grpc_mode or a.grpc_mode, "it starts SGLang's own scheduler"),
    ("--weight-cache-mode", lambda a: a.weight_cache_mode != "off", "it shares the stock shards between processes"),
    ("--startup-weight-load-mode", lambda a: a.startup_weight_load_mode not in (None, "serial"),
     "base weights are assembled right after loading"),
    ("--load-format sharded_state or remote_instance",
     lambda a: a.load_format in ("sharded_state", "remote_instance"), "it copies whole parameter buffers"),
    ("--remote-instance-weight-loader-start-seed-via-transfer-engine",
     lambda a: a.remote_instance_weight_loader_start_seed_via_transfer_engine,
     "it publishes whole parameter buffers"),
    ("--enable-memory-saver without CUDA", lambda a: a.enable_memory_saver and a.device != "cuda",
     "SGLang's memory saver releases GPU memory"),
    ("weight offloading", lambda a: a.cpu_offload_gb > 0 or a.offload_group_size > 0,
     "SP mode reads the base weights in place"),
    ("--is-embedding", lambda a: a.is_embedding, "models with a pooler have no exit from the token-sharded region"),
    ("--model-impl transformers or mindspore", lambda a: a.model_impl in ("transformers", "mindspore"),
     "its layers have no boundaries"),
    ("--enable-deterministic-inference with switching",
     lambda a: a.enable_deterministic_inference and a.enable_shift_parallel and a.shift_policy not in ("tp", "sp"),
     "sums are ordered differently in the two modes; add --shift-policy tp or sp"),
    ("--rl-on-policy-target", lambda a: a.rl_on_policy_target is not None, "sums must be those of the trainer"),
    ("auxiliary hidden states", lambda a: a.enable_return_aux_hidden_states, "they are not gathered yet"),
    ("--enable-mscclpp with --enable-symm-mem", lambda a: a.enable_mscclpp and a.enable_symm_mem,
     "MSCCL++ then takes every buffer for symmetric memory, and those of SP steps are not"),
    ("megakernels", lambda a: a.enable_nvidia_megakernel or a.enable_amd_monokernel,
     "they replace the linears that SP mode runs through"),
)  # fmt: skip


def check_flags(settings: Any) -> None:
    """Check the flags against each other; ``settings`` is a view of the resolved server arguments.

    Raises:
        Refused: with the reason.
    """
    switching, sp_size, world_size = settings.enable_shift_parallel, settings.sp_size, settings.tp_size
    for name in POLICY_FIELDS:
        if (value := getattr(settings, name)) is not None and not switching:
            raise Refused(f"{_flag(name)} {value} needs --enable-shift-parallel; without it no step is switched")
    if not switching and sp_size is None:
        for name, nothing in SP_FIELDS.items():
            if (value := getattr(settings, name)) is not None:
                raise Refused(
                    f"{_flag(name)} {value} needs --sp-size or --enable-shift-parallel; without them {nothing}"
                )
        return
    if settings.shift_graph_buckets is not None and settings.shift_graph_buckets < 0:
        raise Refused(f"--shift-graph-buckets {settings.shift_graph_buckets} must be 0 or more")
    check_policy(settings)
    if world_size < 2:
        raise Refused(f"--tp-size {world_size} leaves nothing to shift; give --tp-size 2 or more")
    if sp_size is not None and sp_size < 2:
        raise Refused(f"--sp-size {sp_size} is not sequence parallelism; give 2 or more, or leave it out")
    if sp_size is not None and world_size % sp_size:
        raise Refused(f"--sp-size {sp_size} does not divide --tp-size {world_size}; choose a divisor of it")
    for what, asked, why in FEATURES:
        if asked(settings):
            raise Refused(f"{what} cannot be combined with sequence parallelism: {why}; leave one of them out")


def check_policy(settings: Any) -> None:
    """Check the flags of the policy against each other.

    Raises:
        Refused: with the reason.
    """
    policy, calibration = settings.shift_policy, settings.shift_calibration
    numbers = {
        name: getattr(settings, name) for name in POLICY_FIELDS if name not in ("shift_policy", "shift_calibration")
    }
    numbers = {name: value for name, value in numbers.items() if value is not None}
    for name, value in numbers.items():
        if value < 0:
            raise Refused(f"{_flag(name)} {value} must be 0 or more")
        takers = policies_using(name)
        if policy not in takers and not (policy is None and name == "shift_threshold"):
            raise Refused(f"{_flag(name)} has no meaning with --shift-policy {policy or 'calibrated'}; leave it out, "
                          f"or give --shift-policy {' or '.join(takers)}")  # fmt: skip
    for what in ("requests", "tokens"):
        enter, leave = (
            numbers.get(f"shift_{side}_{what}", getattr(QueueDepth, f"{side}_{what}")) for side in ("enter", "leave")
        )
        if leave > enter:
            raise Refused(f"--shift-leave-{what} {leave} must not be above --shift-enter-{what} {enter}")
    if policy is not None and policy not in POLICIES:
        if ":" not in policy:
            raise Refused(
                f"--shift-policy {policy} is unknown; choose from {', '.join(POLICIES)}, or give module:Class"
            )
        load_policy(policy)
    if policy == "calibrated" and calibration == "off":
        raise Refused("--shift-policy calibrated needs a calibration; leave out --shift-calibration off")
    if calibration not in (None, "auto", "off") and policy not in (None, "calibrated"):
        raise Refused(f"--shift-calibration {calibration} has no meaning with --shift-policy {policy}; leave one out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_registry(name: str) -> None:
    """Check that SGLang may import its own class; the rank checks which one it loaded.

    Raises:
        Refused: it may not, and would serve the model by transformers' code without a word.
    """
    from sglang.srt.environ import envs

    module = FAMILIES[name].module
    if module in envs.SGLANG_DISABLED_MODEL_ARCHS.get():
        raise Refused(f"SGLANG_DISABLED_MODEL_ARCHS={module} keeps SGLang from its own {name}; unset it")


def check_model(model_config: Any, config: ShiftConfig) -> None:
    """Check that the model is one that every mode serves, at this size.

    Raises:
        Refused: with the reason.
    """
    hf_config = model_config.hf_config
    name = (getattr(hf_config, "architectures", None) or ["unknown"])[0]
    if name not in FAMILIES:
        raise Refused(f"architecture {name} is not served with sequence parallelism; these are: {', '.join(FAMILIES)}")
    check_registry(name)
    if model_config.quantization is not None or getattr(hf_config, "quantization_config", None):
        raise Refused(
            f"quantized weights ({model_config.quantization or 'quantization_config'}) are not served with "
            "sequence parallelism yet; use an unquantized checkpoint"
        )
    if not model_config.is_generation or model_config.is_multimodal:
        raise Refused(f"{name} is served for text generation only")
    check_fields(hf_config, model_config.context_len)
    world_size = config.world_size
    heads = Heads(model_config.num_attention_heads, model_config.get_total_num_kv_heads())
    if not heads.divides_queries(world_size):
        raise Refused(
            f"--tp-size {world_size} does not divide the model's {heads.query} attention heads; choose a divisor of "
            f"{heads.query}"
        )
    if not heads.divides_kv(world_size):
        raise Refused(
            f"--tp-size {world_size} and the model's {heads.kv} KV heads do not divide each other; choose another size"
        )
    intermediate = hf_config.intermediate_size
    if intermediate % world_size:
        raise Refused(f"--tp-size {world_size} does not divide the model's intermediate size {intermediate}")
    if config.exchange_dtype == "fp8":
        shard = heads.of_rank(world_size)
        for name, count in (("QKV", shard.qkv), ("O", shard.query)):
            width = count * model_config.head_dim
            if width % SCALE_BYTES:
                raise Refused(
                    f"--shift-exchange-dtype fp8 takes a multiple of {SCALE_BYTES} columns, and with --tp-size "
                    f"{world_size} a rank has {width} of {name}; give auto"
                )
