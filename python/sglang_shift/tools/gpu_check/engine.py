"""Checks that the answers of real SGLang servers in tp, sp and shift equal the answers of one rank.

On one GPU, two ranks share the GPU. Over gloo they run without CUDA graphs, and gloo's collectives copy CUDA tensors
through the host. Over NCCL they run with CUDA graphs, if NCCL accepts two ranks on one GPU. The speed of such ranks
means nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from sglang_shift.cost.model import PHASES
from sglang_shift.models.random_model import write_random_model
from sglang_shift.tools.gpu_check import environment, one_gpu
from sglang_shift.tools.gpu_check.attention import need_fa3
from sglang_shift.tools.gpu_check.comparison import REQUESTS, ServerComparison, ServerSetup
from sglang_shift.tools.gpu_check.record import Record

MODEL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 512,  # small, so that a comparison shows errors of attention
    "initializer_range": 0.05,  # with the usual 0.02, attention would be almost uniform
    "num_hidden_layers": 4,
    "num_attention_heads": 8,  # heads have 128 elements: FlashInfer lacks kernels for some other sizes
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
VOCABULARY = 4096
"""The vocabulary size of the demo model. This model uses the demo model's tokenizer."""

TOLERANCE = 0.3
"""The largest difference between two logprobs in bfloat16 that rounding explains.

The rounding of two ranks moves a logprob by 0.15. An error in one layer's attention beyond 512 tokens moves it by 0.6
or more. Logits spread over 1.6. Swapped heads move a logprob by a similar amount.
"""

COMMON = [
    *("--dtype", "bfloat16", "--sampling-backend", "pytorch", "--mem-fraction-static", "0.3"),
    *("--max-total-tokens", "16384", "--max-running-requests", str(REQUESTS), "--chunked-prefill-size", "512"),
    *("--skip-server-warmup", "--random-seed", "0"),
]
GRAPHS = ["--cuda-graph-max-bs-decode", str(REQUESTS), "--cuda-graph-max-bs-prefill", "512"]
EAGER = ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
SHARED_GPU_FLAGS = ["--disable-custom-all-reduce"]
"""Ranks that share a GPU run without the custom all-reduce, because it maps memory between GPUs."""

TWO_SHARDS = ("--dcp-size", "2")

ONE_RANK = ServerSetup("TP=1", ["--tp-size", "1", *GRAPHS])
PARALLEL_START_BYTES = 64 << 30
"""The least memory of a GPU on which all servers run at the same time.

``--mem-fraction-static`` of it must hold all that other servers take while one server measures its free memory.
"""


def check_triton(record: Record) -> None:
    """Compare two ranks on one GPU with one rank, with Triton's attention."""
    check_one_gpu(record, "triton")


def check_flashinfer(record: Record) -> None:
    """Compare two ranks on one GPU with one rank, with FlashInfer's attention."""
    # The kernels of FlashInfer's other way to prefill take minutes to compile.
    os.environ.setdefault("SGLANG_FLASHINFER_USE_PAGED", "1")
    check_one_gpu(record, "flashinfer")


def check_one_gpu(record: Record, attention: str) -> None:
    """Compare two ranks on one GPU with TP=1, over each backend that allows it."""
    compare_two_ranks(record, attention, attention, {"gloo": (), "nccl": PHASES})


def compare_two_ranks(
    record: Record, name: str, attention: str, graphs: dict[str, tuple[str, ...]], *own_flags: str, **fields: Any
) -> None:
    """Compare two ranks on one GPU with TP=1, over each backend that allows it.

    Args:
        record: Takes the findings.
        name: The name of the comparison.
        attention: The attention backend of all servers.
        graphs: The backends over which the ranks communicate, with the phases whose steps must replay graphs.
        own_flags: More flags of the two ranks.
        fields: Other fields of the model.
    """
    with TemporaryDirectory(prefix="sglang_shift_") as temporary:
        folder = Path(temporary)
        flags = [*model_flags(folder, **fields), "--attention-backend", attention]
        others, skipped = [], ""
        for backend, phases in graphs.items():
            label = f"two ranks over {backend}"
            try:
                variables = one_gpu.environment(backend, folder / backend)
            except pytest.skip.Exception as reason:
                skipped = f"{label}: skipped: {reason}"
                record.note(skipped)
                continue
            two = ["--tp-size", "2", *own_flags, *SHARED_GPU_FLAGS, *(GRAPHS if phases else EAGER)]
            others.append(ServerSetup(label, two, variables, phases))
        if not others:
            pytest.skip(skipped)
        at_once = torch.cuda.get_device_properties(0).total_memory >= PARALLEL_START_BYTES
        ServerComparison(record, name, flags, VOCABULARY, TOLERANCE).run(ONE_RANK, others, at_once)


def check_several(record: Record) -> None:
    """Compare several GPUs with TP=1, at every S. The ranks are the most by which the model can be divided."""
    ranks = max(size for size in (2, 4, 8) if size <= environment.gpus())
    with TemporaryDirectory(prefix="sglang_shift_") as name:
        others = [
            ServerSetup(f"P={ranks}, S={sp}", ["--tp-size", str(ranks), "--sp-size", str(sp), *GRAPHS], graphs=PHASES)
            for sp in (2, 4, 8)
            if sp <= ranks
        ]
        ServerComparison(record, "gpus", model_flags(Path(name)), VOCABULARY, TOLERANCE).run(ONE_RANK, others)


def check_token_shards(record: Record) -> None:
    """Compare two ranks on one GPU that divide a KV cache by token with TP=1, with SGLang's Triton backend, over NCCL.

    Gloo lacks the reduce-scatter of this backend's decodes. SGLang captures no graphs of prefills for such a cache.
    """
    compare_two_ranks(record, "token-shards", "triton", {"nccl": ("decode",)}, *TWO_SHARDS, num_key_value_heads=1)


def check_token_shards_fa3(record: Record) -> None:
    """The same with our FlashAttention 3 backend, also over gloo. The server of one rank has SGLang's backend."""
    need_fa3()
    graphs = {"gloo": (), "nccl": ("decode",)}
    compare_two_ranks(record, "token-shards-fa3", "fa3", graphs, *TWO_SHARDS, num_key_value_heads=1)


def check_exchange_pipeline(record: Record) -> None:
    """Compare two ranks on one GPU that exchange their heads group by group with TP=1, over NCCL.

    Gloo has no single messages between GPUs.
    """
    flags = ("--shift-exchange-pipeline", "on")
    compare_two_ranks(record, "exchange-pipeline", "triton", {"nccl": ()}, *flags, num_key_value_heads=2)


def model_flags(folder: Path, **fields: Any) -> list[str]:
    """Write the model into ``folder``, with other ``fields``. Return the flags of every server of this model."""
    write_random_model(folder / "model", **{**MODEL, **fields})
    return ["--model-path", str(folder / "model"), *COMMON]
