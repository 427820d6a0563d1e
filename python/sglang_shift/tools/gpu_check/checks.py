"""The checks, in the order in which they run: what is right comes before how fast it is."""

from __future__ import annotations

from sglang_shift.tools.gpu_check.runner import Check


def _check(name: str, module: str, limit: float, text: str, gpus: int = 1) -> Check:
    return Check(name, text, f"sglang_shift.tools.gpu_check.{module}", limit, gpus)


CHECKS = (
    _check("kernels", "kernels:check", 60, "our pack and unpack kernels: right, and how fast beside a copy"),
    _check("graphs", "graphs:check", 60, "CUDA graphs of both modes: captured, replayed, right"),
    _check("exchange", "exchange:check", 120, "FlashInfer's exchange and the collective one give what was sent"),
    _check("exchange-gpus", "exchange:check_several", 300, "the same on several GPUs, with NVLink's kernel", gpus=2),
    _check("links", "links:check", 300, "all-to-all and all-reduce, 8 B to 1 GiB", gpus=2),
    _check("engine-gpus", "engine:check_several", 480, "SGLang on all GPUs at every S: modes equal TP=1", gpus=2),
    _check("engine-triton", "engine:check_triton", 240, "SGLang with Triton attention: tp, sp and shift equal TP=1"),
    _check("engine-flashinfer", "engine:check_flashinfer", 240, "the same with FlashInfer's attention"),
    _check("dispatch", "dispatch:check", 100, "SGLang's own GEMM kernels are right on our views of base weights"),
    _check("steps", "steps:check", 90, "a rank's step in both modes, eager and as a graph, without the links"),
    _check("engine-memory", "memory:check", 150, "SGLang's memory saver frees the base weights and brings them back"),
    _check("gemms", "gemms:check", 100, "GEMMs of a rank in both modes, and what a view costs beside a copy"),
)
