"""Plain PyTorch where SGLang launches a Triton kernel on this platform, or has no code for CPUs.

They take the place of SGLang's functions in stock servers on this platform as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from sglang_shift.platforms.cpu import is_active
from sglang_shift.seams import extends, put_in_place, replaces


@replaces(
    "sglang.srt.layers.logits_processor:fused_softcap",
    "SGLang's is a Triton kernel",
    when=is_active,
)
def cap_logits(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap logits at +-``cap`` in place, smoothly, in place of ``softcap_inplace_logits``."""
    return logits.div_(cap).tanh_().mul_(cap)


@replaces(
    "sglang.kernels.ops.elementwise.elementwise:_launch_fused_gate_sigmoid_mul",
    "SGLang's launches a Triton kernel",
    when=is_active,
)
def gate_shared_expert(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """Multiply the shared expert's output by its gate, in place of ``_launch_fused_gate_sigmoid_mul``.

    Args:
        hidden_states: ``[tokens, hidden size]``.
        gate_weight: ``[hidden size]``: the gate is the sigmoid of its product with a token.
        shared_output: ``[tokens, hidden size]``.
        output: ``[tokens, hidden size]``, where the result goes.
        do_add: Whether the result is added to ``output``.
    """
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float()).unsqueeze(1)
    gated = gate * shared_output
    output.copy_(output + gated if do_add else gated)


@replaces(
    "sglang.srt.mem_cache.allocation:get_last_loc_triton",
    "SGLang's launches a Triton kernel",
    when=is_active,
)
def last_slots(table: torch.Tensor, rows: torch.Tensor, prefix_lens: torch.Tensor) -> torch.Tensor:
    """The KV slot of each request's last cached token, -1 if there is none, in place of ``get_last_loc_triton``."""
    last = table[rows, (prefix_lens - 1).clamp(min=0)].to(prefix_lens.dtype)
    return torch.where(prefix_lens > 0, last, -1)


@replaces(
    "sglang.srt.layers.rotary_embedding.factory:get_rope_cpu",
    "SGLang's knows only DeepSeek's yarn, for its CPU engine",
    when=is_active,
)
def rope_of_mla(*args: Any, **kwargs: Any) -> Any:
    """The rotary embedding as on GPUs, in place of ``get_rope_cpu``, whose last argument is the device."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    kwargs.pop("device", None)
    return get_rope(*args[:8], **kwargs)


@replaces(
    "sglang.srt.layers.moe.fused_moe_native:moe_forward_native",
    "SGLang's has no experts of other ranks, no weights on the input, and compiles the activation of gpt-oss",
    when=is_active,
)
def experts(layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any) -> torch.Tensor:
    """Run a layer's experts, in place of ``moe_forward_native``.

    Args:
        layer: SGLang's experts. Its weights are ``w13_weight`` ``[experts, 2 * intermediate size, hidden size]`` and
            ``w2_weight`` ``[experts, hidden size, intermediate size]``.
        x: ``[tokens, hidden size]``.
        topk_output: The experts of each token and their weights. An expert of another rank is -1.
        moe_runner_config: The activation and other properties of the experts.

    Returns:
        ``[tokens, hidden size]``: the weighted sum of this rank's experts.
    """
    weights, ids, _ = topk_output
    tokens, choices = ids.shape
    order = ids.reshape(-1).argsort(stable=True)
    counts = torch.bincount(ids.reshape(-1) + 1, minlength=layer.w13_weight.shape[0] + 1).tolist()
    on_input = moe_runner_config.apply_router_weight_on_input
    chosen = x.new_zeros(tokens * choices, layer.w2_weight.shape[1])
    start = counts[0]  # the choices of other ranks' experts
    for expert, count in enumerate(counts[1:]):
        if count:
            picks = order[start : start + count]
            rows = x[picks // choices]
            if on_input:
                rows = rows * weights.reshape(-1)[picks].unsqueeze(1).to(rows.dtype)
            hidden = linear(rows, layer.w13_weight[expert], layer, "w13_weight_bias", expert)
            hidden = activate(hidden, moe_runner_config)
            chosen[picks] = linear(hidden, layer.w2_weight[expert], layer, "w2_weight_bias", expert)
            start += count
    chosen = chosen.view(tokens, choices, chosen.shape[1])
    if on_input:
        return chosen.sum(1)
    return (chosen.to(weights.dtype) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, layer: Any, bias_name: str, expert: int) -> torch.Tensor:
    """One expert's linear layer. As in SGLang's code for CPUs, a bias is added in float32."""
    out = F.linear(x, weight)
    bias = getattr(layer, bias_name, None)
    return out if bias is None else (out.float() + bias[expert]).to(out.dtype)


def activate(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """The activation of an expert, from ``[tokens, 2 * intermediate size]`` if it is gated.

    Raises:
        ValueError: the activation is unknown.
    """
    if config.activation == "silu" and config.is_gated and config.gemm1_alpha is not None:
        return clamped_swiglu(hidden, config.gemm1_alpha, config.gemm1_clamp_limit, config.gate_up_interleaved)
    function = ACTIVATIONS.get(config.activation)
    if function is None or config.gemm1_alpha is not None or config.swiglu_limit is not None:
        raise ValueError(
            f"the experts of layer {config.layer_id} need the activation {config.activation} with gemm1_alpha "
            f"{config.gemm1_alpha} and swiglu_limit {config.swiglu_limit}, which the CPU platform does not have; "
            "serve this model on a GPU"
        )
    if not config.is_gated:
        return function(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    gate, limit = function(gate), config.gemm1_clamp_limit
    return gate * up if limit is None else gate.clamp(max=limit) * up.clamp(-limit, limit)


def clamped_swiglu(hidden: torch.Tensor, alpha: float, limit: float, interleaved: bool) -> torch.Tensor:
    """gpt-oss's activation: ``gate * sigmoid(alpha * gate) * (up + 1)`` with both clamped at ``limit``.

    Gates and ups are columns in turn if they are ``interleaved``, and halves otherwise.
    """
    gate, up = (hidden[..., ::2], hidden[..., 1::2]) if interleaved else hidden.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate * alpha) * (up + 1)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@extends(
    "sglang.srt.models.deepseek_common.attention_backend_handler:AttentionBackendRegistry.register",
    "MLA attends to the latents in the KV cache, in prefills too; SGLang would call an attention that reads no latents",
)
def absorbed(attention: Any, forward_batch: Any) -> Any:
    """How an MLA layer computes a step on this platform: with the weights absorbed, in every phase."""
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    return AttnForwardMethod.MLA


def register() -> None:
    """Put all of them in place. SGLang uses MLA's rule for ``triton`` for every backend without one, too."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    for function in (cap_logits, gate_shared_expert, last_slots, rope_of_mla, experts):
        put_in_place(function)
    AttentionBackendRegistry.register("triton", absorbed)
