"""Refuse flags: features of SGLang that do not combine with SP, and flags that contradict each other.

``python -m sglang_shift.args refusals`` prints ``docs/refusals.md`` from all refusals, of this module and of others.
"""

from __future__ import annotations

import math
from typing import Any

from sglang.srt.environ import envs

from sglang_shift.args.feature import Feature, first_requested, uses_lora
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.flags import BY_NAME, FLAGS, LIVE_NUMBERS, POLICIES, Need
from sglang_shift.observe.metrics import LABELS
from sglang_shift.platforms.cpu import DRAFT_MODELS
from sglang_shift.policy.builtin import load_policy

SPECULATION = ("NGRAM", *DRAFT_MODELS)
"""The algorithms of speculative decoding that are served. SGLang resolves NEXTN to one of the others."""

FEATURES = (
    Feature("--pp-size > 1", lambda a: a.pp_size > 1,
     "the token-sharded residual stream does not cross pipeline stages"),
    Feature("attention DP", lambda a: a.attn_dp_size > 1 or a.enable_dp_attention,
     "its ranks hold the KV cache of different requests"),
    Feature("context parallelism", lambda a: a.attn_cp_size > 1 or a.enable_prefill_cp,
     "it shards the sequence in its own layout"),
    Feature("--enable-layernorm-sp", lambda a: a.enable_layernorm_sp, "sglang_shift uses the same seam"),
    Feature("--enable-attn-tp-input-scattered, --enable-dense-mlp-attn-tp or --moe-dense-tp-size",
     lambda a: a.enable_attn_tp_input_scattered or a.enable_dense_mlp_attn_tp or a.moe_dense_tp_size is not None,
     "they lay out the rows of a layer in their own way"),
    Feature("--moe-a2a-backend", lambda a: a.moe_a2a_backend not in (None, "none"),
     "it sends tokens to experts in its own way, for ranks that have different requests"),
    Feature("--ep-size with --shift-experts replicated", lambda a: a.ep_size > 1 and a.shift_experts == "replicated",
     "the experts of a rank are then not a part of each expert"),
    Feature("--enable-return-routed-experts or --expert-distribution-recorder-mode with --shift-experts replicated",
     lambda a: a.shift_experts == "replicated"
     and bool(a.enable_return_routed_experts or a.expert_distribution_recorder_mode),
     "each rank then chooses experts for its own tokens only, and SGLang reads the choices of one rank"),
    Feature("--enable-two-batch-overlap or --enable-single-batch-overlap",
     lambda a: a.enable_two_batch_overlap or a.enable_single_batch_overlap, "a step has one token-sharded region"),
    Feature("--enable-pdmux", lambda a: a.enable_pdmux, "it runs two batches at once"),
    Feature("--speculative-algorithm other than NGRAM, EAGLE, EAGLE3 and STANDALONE",
     lambda a: a.speculative_algorithm is not None and a.speculative_algorithm.upper() not in SPECULATION,
     "its draft model has not been tested with SP steps"),
    Feature("--speculative-adaptive", lambda a: a.speculative_adaptive,
     "the policy and the CUDA graphs need to know how many drafts a step verifies"),
    Feature("--speculative-use-rejection-sampling without CUDA",
     lambda a: a.speculative_use_rejection_sampling and a.device != "cuda",
     "SGLang samples and verifies such drafts in a Triton kernel"),
    Feature("--enable-multi-layer-eagle", lambda a: a.enable_multi_layer_eagle,
     "its draft models have not been tested with SP steps"),
    Feature("--enable-torch-compile", lambda a: a.enable_torch_compile, "compiled code is keyed by shape, not by mode"),
    Feature("--cuda-graph-backend-prefill full",
     lambda a: getattr(getattr(a.cuda_graph_config, "prefill", None), "backend", None) == "full",
     "attention backends size its workspace for the graphs of one mode"),
    Feature("--debug-cuda-graph", lambda a: a.debug_cuda_graph, "it runs a step's Python again inside the step"),
    Feature("--dllm-algorithm", lambda a: a.dllm_algorithm is not None, "diffusion models are not served"),
    Feature("--elastic-ep-backend", lambda a: a.elastic_ep_backend is not None, "ranks must not come and go"),
    Feature("--enable-pd-role-switch", lambda a: a.enable_pd_role_switch,
     "the CUDA graphs of SP steps are planned at start-up, for one role"),
    Feature("--use-ray", lambda a: a.use_ray, "its actors build SGLang's own scheduler"),
    Feature("--encoder-only", lambda a: a.encoder_only, "an encoder has no steps to shift"),
    Feature("--language-only", lambda a: a.language_only,
     "requests with images that an encoder server computes have not been tested with SP steps"),
    Feature("gRPC serving", lambda a: a.smg_grpc_mode or a.grpc_mode, "it starts SGLang's own scheduler"),
    Feature("SGLANG_RUST_SERVER", lambda a: envs.SGLANG_RUST_SERVER.get(),
     "its server checks no requests for us, and has no page"),
    Feature("SGLANG_ENABLE_PCG_DSV2_DUAL_STREAM or SGLANG_OPT_MOE_QUANT_ONCE",
     lambda a: envs.SGLANG_ENABLE_PCG_DSV2_DUAL_STREAM.get() or envs.SGLANG_OPT_MOE_QUANT_ONCE.get(),
     "experts then get the rows of one rank past the place at which SP steps gather those of all ranks"),
    Feature("--weight-cache-mode", lambda a: a.weight_cache_mode != "off",
     "it shares the stock shards between processes"),
    Feature("--startup-weight-load-mode", lambda a: a.startup_weight_load_mode not in (None, "serial"),
     "SGLang then fills the weights after they were gathered, and checks that none has moved"),
    Feature("--load-format sharded_state or remote_instance",
     lambda a: a.load_format in ("sharded_state", "remote_instance"), "it copies whole parameter buffers"),
    Feature("--remote-instance-weight-loader-start-seed-via-transfer-engine",
     lambda a: a.remote_instance_weight_loader_start_seed_via_transfer_engine,
     "it publishes whole parameter buffers"),
    Feature("--enable-memory-saver without CUDA", lambda a: a.enable_memory_saver and a.device != "cuda",
     "SGLang's memory saver releases GPU memory"),
    Feature("weight offloading", lambda a: a.cpu_offload_gb > 0 or a.offload_group_size > 0,
     "SP mode reads the base weights in place"),
    Feature("--model-impl transformers or mindspore", lambda a: a.model_impl in ("transformers", "mindspore"),
     "its layers have no boundaries"),
    Feature("--enable-deterministic-inference with switching",
     lambda a: a.enable_deterministic_inference and a.enable_shift_parallel and a.shift_policy not in ("tp", "sp"),
     "sums are ordered differently in the two modes; add --shift-policy tp or sp"),
    Feature("--enable-deterministic-inference with --enable-lora or --lora-paths, and without --shift-policy tp",
     lambda a: a.enable_deterministic_inference and uses_lora(a) and a.shift_policy != "tp",
     "a request runs in TP beside one with an adapter, and in SP alone; add --shift-policy tp"),
    Feature("--rl-on-policy-target", lambda a: a.rl_on_policy_target is not None, "sums must be those of the trainer"),
    Feature("auxiliary hidden states", lambda a: a.enable_return_aux_hidden_states, "they are not gathered yet"),
    Feature("--enable-mscclpp with --enable-symm-mem", lambda a: a.enable_mscclpp and a.enable_symm_mem,
     "MSCCL++ then takes every buffer for symmetric memory, and those of SP steps are not"),
    Feature("megakernels", lambda a: a.enable_nvidia_megakernel or a.enable_amd_monokernel,
     "they replace the linears that SP mode runs through"),
)  # fmt: skip
FEATURE_CONFLICT = Refusal(
    "{feature} cannot be combined with sequence parallelism: {reason}; leave one of them out",
    "Each of these features has its own reason.",
)

LABEL_TAKEN = Refusal(
    "--extra-metric-labels has {label}, which metrics of sglang_shift have themselves; give it another name",
    "Prometheus takes no metric with two labels of one name.",
)
NEEDS_SWITCHING = Refusal(
    "{flag} {value} needs --enable-shift-parallel; without it no step is switched",
    "These are settings of the policy: " + ", ".join(f.option for f in FLAGS if f.need is Need.SWITCHING) + ".",
)
NEEDS_SP = Refusal(
    "{flag} {value} needs --sp-size or --enable-shift-parallel; without them {reason}",
    "These are settings of SP mode: " + ", ".join(f.option for f in FLAGS if f.need is Need.SP) + ".",
)
NEEDS_INSTANCES = Refusal(
    "{flag} {value} needs --instances; without it there is one instance",
    "These are settings of instances: " + ", ".join(f.option for f in FLAGS if f.need is Need.INSTANCES) + ".",
)
NEGATIVE = Refusal("{flag} {value} must be 0 or more", "The number counts tokens, requests, graphs or milliseconds.")
NOT_OF_THE_POLICY = Refusal(
    "{flag} {value} has no meaning with --shift-policy {policy}; leave it out, or give --shift-policy {policies}",
    "Other policies do not use this number.",
)
LEAVES_ABOVE_ENTER = Refusal(
    "{leave_flag} {N} must not be above {enter_flag} {M}",
    "The queue cannot be short again while it is still deep.",
)
UNKNOWN_POLICY = Refusal(
    "--shift-policy {policy} is unknown; choose from {policies}, or give module:Class",
    "Nothing would choose the modes.",
)
NO_CALIBRATION = Refusal(
    "--shift-policy calibrated needs a calibration; leave out --shift-calibration off",
    "The policy compares step times, and the calibration is where they come from.",
)
CALIBRATION_UNUSED = Refusal(
    "--shift-calibration {value} has no meaning with --shift-policy {policy}; leave one out",
    "Only the policy calibrated uses step times.",
)
TARGET_NEEDS_TIMES = Refusal(
    "--shift-tbt-target {value} needs step times, and --shift-policy {policy} has none; give --shift-policy calibrated "
    "and leave out --shift-calibration off",
    "The calibration says how many prompt tokens fit the target.",
)
TARGET_NEEDS_CHUNKS = Refusal(
    "--shift-tbt-target {value} needs chunked prefills; leave out --chunked-prefill-size {chunk}",
    "Without chunks, a step computes whole prompts, however long they are.",
)
TARGET_NEEDS_BOTH = Refusal(
    "--shift-tbt-target {value} has no meaning with --disaggregation-mode {mode}; leave one out",
    "Such a server has prompts or decodes, but not both.",
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


def check_flags(settings: Any) -> None:
    """Check the flags against each other.

    Args:
        settings: A view of the resolved server arguments.

    Raises:
        Refused: two flags do not combine, or a value is not possible; the error has the reason.
    """
    switching, sp_size, world_size = settings.enable_shift_parallel, settings.sp_size, settings.tp_size
    values = [(flag, getattr(settings, flag.name)) for flag in FLAGS]
    flags_with_value = [(flag, value) for flag, value in values if value is not None]
    for flag, value in flags_with_value:
        if flag.need is Need.SWITCHING and not switching:
            raise NEEDS_SWITCHING(flag=flag.option, value=value)
        if flag.need is Need.INSTANCES and settings.instances is None:
            raise NEEDS_INSTANCES(flag=flag.option, value=value)
    if not switching and sp_size is None and settings.instances is None:
        for flag, value in flags_with_value:
            if flag.need is Need.SP:
                raise NEEDS_SP(flag=flag.option, value=value, reason=flag.without)
        return
    if settings.shift_graph_buckets is not None and settings.shift_graph_buckets < 0:
        raise NEGATIVE(flag="--shift-graph-buckets", value=settings.shift_graph_buckets)
    check_policy(settings)
    if world_size < 2:
        raise ONE_RANK(P=world_size)
    if sp_size is not None and sp_size < 2:
        raise NO_SP(S=sp_size)
    if sp_size is not None and world_size % sp_size:
        raise NOT_A_DIVISOR(S=sp_size, P=world_size)
    if feature := first_requested(FEATURES, settings):
        raise FEATURE_CONFLICT(feature=feature.name, reason=feature.why)
    check_labels(settings)


def check_labels(settings: Any) -> None:
    """Check the labels that the user gives to all metrics.

    Raises:
        Refused: our metrics have one of them already.
    """
    for label in settings.extra_metric_labels or ():
        if settings.enable_metrics and label in LABELS:
            raise LABEL_TAKEN(label=label)


def check_policy(settings: Any) -> None:
    """Check the flags of the policy against each other.

    Args:
        settings: A view of the resolved server arguments.

    Raises:
        Refused: two flags do not combine, or a value is not possible; the error has the reason.
    """
    policy, calibration = settings.shift_policy, settings.shift_calibration
    numbers = {flag.name: getattr(settings, flag.name) for flag in LIVE_NUMBERS}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    for name, value in numbers.items():
        flag = BY_NAME[name]
        if value < 0:
            raise NEGATIVE(flag=flag.option, value=value)
        if policy not in flag.policies and not (policy is None and name == "shift_threshold"):
            raise NOT_OF_THE_POLICY(
                flag=flag.option, value=value, policy=policy or "calibrated", policies=" or ".join(flag.policies)
            )
    for what in ("requests", "tokens"):
        enter, leave = BY_NAME[f"shift_enter_{what}"], BY_NAME[f"shift_leave_{what}"]
        low, high = (numbers.get(flag.name, getattr(ShiftConfig, flag.setting)) for flag in (leave, enter))
        if low > high:
            raise LEAVES_ABOVE_ENTER(leave_flag=leave.option, N=low, enter_flag=enter.option, M=high)
    if policy is not None and policy not in POLICIES:
        if ":" not in policy:
            raise UNKNOWN_POLICY(policy=policy, policies=", ".join(POLICIES))
        load_policy(policy)
    if policy == "calibrated" and calibration == "off":
        raise NO_CALIBRATION()
    if calibration not in (None, "auto", "off") and policy not in (None, "calibrated"):
        raise CALIBRATION_UNUSED(value=calibration, policy=policy)


def check_target(settings: Any, config: ShiftConfig) -> None:
    """Check ``--shift-tbt-target``.

    Args:
        settings: A view of the resolved server arguments.
        config: The configuration that follows from them.

    Raises:
        Refused: the value is not possible, or other flags leave nothing to bound; the error has the reason.
    """
    target, chunk = config.tbt_target, settings.chunked_prefill_size
    value = f"{target:g}"
    if not 0 <= target < math.inf:
        raise NEGATIVE(flag="--shift-tbt-target", value=value)
    if not target:
        return
    if config.policy != "calibrated":
        raise TARGET_NEEDS_TIMES(value=value, policy=config.policy)
    if chunk is not None and chunk < 1:
        raise TARGET_NEEDS_CHUNKS(value=value, chunk=chunk)
    if settings.disaggregation_mode != "null":
        raise TARGET_NEEDS_BOTH(value=value, mode=settings.disaggregation_mode)
