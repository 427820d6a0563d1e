"""Blocks of experts on one CUDA stream, for SP steps that sum over a base-TP group.

Some of SGLang's blocks run their shared experts beside the routed ones, on a second stream. In TP, neither of them
communicates inside of the block. In SP steps, both sum their rows over the base-TP group. SGLang's all-reduce of a
group has one set of buffers, so two sums at the same time could mix their numbers.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

from sglang_shift.parallel.forwards import Forwards
from sglang_shift.seams import relies_on


@relies_on(
    "sglang.srt.models.qwen2_moe:Qwen2MoeSparseMoeBlock.forward",
    "This block runs on one stream if its alt_stream is None. So do the blocks of other models.",
)
@relies_on(
    "sglang.srt.models.llama4:Llama4MoE._forward_core",
    "On a GPU, this method calls the one of two methods that uses a second stream, which no attribute holds.",
)
def run_on_one_stream(model: torch.nn.Module, forwards: Forwards) -> None:
    """Let all modules of ``model`` that contain routed experts run on one stream in SP steps."""
    for module in model.modules():
        if not any(isinstance(part, FusedMoE) for part in module.modules()):
            continue
        if getattr(module, "alt_stream", None) is not None:
            forwards.replace(module, None, "alt_stream")
        if hasattr(module, "_forward_core_shared_routed_overlap"):
            forwards.replace(module, module._forward_core_normal, "_forward_core_shared_routed_overlap")
