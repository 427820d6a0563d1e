"""The real SGLang: its answers in tp, sp and shift equal those of one rank.

On one GPU two ranks share it: over gloo, whose collectives take CUDA tensors by way of the host, without CUDA
graphs; and over NCCL with them, where NCCL lets two ranks have one GPU. Their speed means nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from sglang_shift.models.random_model import write_random_model
from sglang_shift.tools.gpu_check import environment, one_gpu
from sglang_shift.tools.gpu_check.comparison import REQUESTS, Comparison, Contender
from sglang_shift.tools.gpu_check.record import Record

MODEL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 512,  # little beside attention, which a comparison is to see
    "initializer_range": 0.05,  # with the usual 0.02, attention would be all but uniform
    "num_hidden_layers": 4,
    "num_attention_heads": 8,  # of 128: FlashInfer has no kernels for some other sizes
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
VOCABULARY = 4096
"""The demo model's, whose tokenizer it has."""

TOLERANCE = 0.3
"""Of a logprob in bfloat16. What two ranks round moves one by 0.15; what is wrong with one layer's attention beyond
512 tokens, by 0.6 or more. Logits spread over 1.6: exchanged heads differ by as much."""

COMMON = [
    *("--dtype", "bfloat16", "--sampling-backend", "pytorch", "--mem-fraction-static", "0.3"),
    *("--max-total-tokens", "16384", "--max-running-requests", str(REQUESTS), "--chunked-prefill-size", "512"),
    *("--skip-server-warmup", "--random-seed", "0"),
]
GRAPHS = ["--cuda-graph-max-bs-decode", str(REQUESTS), "--cuda-graph-max-bs-prefill", "512"]
EAGER = ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
SHARING = ["--disable-custom-all-reduce"]
"""It maps memory between GPUs."""

ONE_RANK = Contender("TP=1", ["--tp-size", "1", *GRAPHS])
AT_ONCE_BYTES = 64 << 30
"""Of a GPU: ``--mem-fraction-static`` of it must hold all that other servers take while one measures what is free."""


def check_triton(record: Record) -> None:
    """One rank, and two on the same GPU, with Triton's attention."""
    check_one_gpu(record, "triton")


def check_flashinfer(record: Record) -> None:
    """The same with FlashInfer's."""
    # Its other way to prefill has kernels that take minutes to compile.
    os.environ.setdefault("SGLANG_FLASHINFER_USE_PAGED", "1")
    check_one_gpu(record, "flashinfer")


def check_one_gpu(record: Record, attention: str) -> None:
    """TP=1, and two ranks over each backend that can."""
    with TemporaryDirectory(prefix="sglang_shift_") as name:
        folder = Path(name)
        flags = [*model_flags(folder), "--attention-backend", attention]
        others = []
        for backend, graphs in (("gloo", False), ("nccl", True)):
            label = f"two ranks over {backend}"
            try:
                variables = one_gpu.environment(backend, folder / backend)
            except pytest.skip.Exception as reason:
                record.note(f"{label}: skipped: {reason}")
                continue
            own = ["--tp-size", "2", *SHARING, *(GRAPHS if graphs else EAGER)]
            others.append(Contender(label, own, variables, graphs))
        at_once = torch.cuda.get_device_properties(0).total_memory >= AT_ONCE_BYTES
        Comparison(record, attention, flags, VOCABULARY, TOLERANCE).run(ONE_RANK, others, at_once)


def check_several(record: Record) -> None:
    """TP=1, then as many GPUs as the model can be divided by, at every S."""
    ranks = max(size for size in (2, 4, 8) if size <= environment.gpus())
    with TemporaryDirectory(prefix="sglang_shift_") as name:
        others = [
            Contender(f"P={ranks}, S={sp}", ["--tp-size", str(ranks), "--sp-size", str(sp), *GRAPHS], graphs=True)
            for sp in (2, 4, 8)
            if sp <= ranks
        ]
        Comparison(record, "gpus", model_flags(Path(name)), VOCABULARY, TOLERANCE).run(ONE_RANK, others)


def model_flags(folder: Path) -> list[str]:
    """Make the model in ``folder``, and the flags that every server of it has."""
    write_random_model(folder / "model", **MODEL)
    return ["--model-path", str(folder / "model"), *COMMON]
