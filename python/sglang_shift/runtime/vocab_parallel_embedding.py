"""Replace the all-reduce that SGLang's ``vocab_parallel_embedding`` calls."""

from __future__ import annotations

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.runtime_context import get_forward

from sglang_shift.parallel.region import scatter_sum
from sglang_shift.parallel.step import current
from sglang_shift.seams import relies_on, replaces


@replaces(
    "sglang.srt.layers.vocab_parallel_embedding:tensor_model_parallel_all_reduce",
    "each rank completes the rows of its own tokens only",
)
@relies_on(
    "sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward",
    "it sums its rows by that function alone",
)
@relies_on(
    "sglang.srt.model_executor.model_runner:ModelRunner._extend_forward_kwargs",
    "it calls the embedding for all rows if a request replaces some",
)
def reduce_embedding(partial: torch.Tensor) -> torch.Tensor:
    """Sum the rows that the embedding looked up. In an SP step, also enter the region with this rank's tokens.

    Args:
        partial: ``[T, h]``, this rank's part of the sum.

    Returns:
        ``[ceil(T / S), h]`` in an SP step, otherwise ``[T, h]``.
    """
    step = current()
    # If a request replaces the embeddings of some tokens, SGLang writes them into all T rows.
    if step is None or not step.sharded or get_forward().sp_active or step.batch.replace_embeds is not None:
        return tensor_model_parallel_all_reduce(partial)
    return scatter_sum(step, partial)
