"""What a request must be for the ranks to receive and run it: checked before they see it.

Any error in a rank ends the server, so a request that would raise one there is answered with an error instead.
SGLang's own checks come first; these are for what they let through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import torch
from sglang.srt.managers import io_struct

NO_TOKENS = "the request has no tokens; give a text, input_ids or input_embeds that is not empty"

MAX_SAMPLES = 16_384
"""The largest n. SGLang copies the request so often before it looks at any other limit."""

MAX_TOP_K = 2**31 - 1
"""The largest top_k that fits the tensor which carries it."""


def check_samples(sampling_params: Any) -> None:
    """Check n before SGLang makes n copies of the request, while nothing else is answered.

    Raises:
        ValueError: n is too large.
    """
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        n = params.get("n") if isinstance(params, dict) else None
        if isinstance(n, int) and n > MAX_SAMPLES:
            raise ValueError(f"n is {n} and must be at most {MAX_SAMPLES}; send several requests")


def check_values(request: Any, model: Any) -> None:
    """Check the values of a tokenized request that have to fit a tensor, or to be an index into one.

    Raises:
        ValueError: one does not fit.
    """
    vocab_size = model.vocab_size
    overrides = request.positional_embed_overrides
    if overrides is not None and not isinstance(overrides, io_struct.PositionalEmbeds):
        raise ValueError("positional_embed_overrides has tensors and cannot be given as JSON; leave it out")
    if request.input_ids and request.mm_inputs is None:  # the processor of a multimodal model puts in others
        check_tokens("input_ids", (min(request.input_ids), max(request.input_ids)), vocab_size)
    params = request.sampling_params
    check_tokens("stop_token_ids", params.stop_token_ids or (), vocab_size)
    if params.top_k > MAX_TOP_K:
        raise ValueError(f"top_k is {params.top_k} and must be at most {MAX_TOP_K}; give -1 for the whole vocabulary")
    if isinstance(request, io_struct.TokenizedEmbeddingReqInput):
        return
    if request.input_embeds is not None:
        check_rows(request.input_embeds, model)
    if (start := request.logprob_start_len) < -1:
        raise ValueError(f"logprob_start_len is {start} and must be at least -1; give -1 for the new tokens only")
    if not 0 <= (top := request.top_logprobs_num) <= vocab_size:
        raise ValueError(f"top_logprobs_num is {top} and must be between 0 and the {vocab_size} tokens there are")


def check_rows(rows: Any, model: Any) -> None:
    """Check embeddings that come with a request: SGLang makes one tensor of them, in bfloat16.

    Raises:
        ValueError: they are not as wide as the model, or it has another dtype.
    """
    if model.dtype != torch.bfloat16:
        raise ValueError(f"input_embeds are bfloat16, but the model is served in {model.dtype}; give --dtype bfloat16")
    for row in rows:
        if len(row) != model.hidden_size:
            raise ValueError(f"input_embeds has a row of {len(row)}, but the model's have {model.hidden_size} numbers")


def check_tokens(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Check that each of ``tokens`` exists.

    Raises:
        ValueError: one does not.
    """
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} has {token}, but the model's tokens are 0 to {vocab_size - 1}; leave it out")


def check_message(message: Any) -> None:
    """Encode and decode a message as on its way to the ranks: the types of its fields are checked there.

    Raises:
        ValueError: it cannot be sent, or a field has another type than it must have.
    """
    if io_struct._USE_PICKLE_IPC or not isinstance(message, msgspec.Struct):
        return
    try:
        io_struct._msgpack_decoder.decode(io_struct.msgpack_encode(message))
    except (TypeError, OverflowError, ValueError) as error:  # msgspec's own errors are ValueErrors
        raise ValueError(f"the request cannot be sent to the ranks: {error}; correct that value") from error
