"""What a request must be for the ranks to receive and run it: checked before they see it.

Any error in a rank ends the server, so a request that would raise one there is answered with an error instead.
SGLang's own checks come first; these are for what they let through.
"""

from __future__ import annotations

from typing import Any

import msgspec
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


def check_values(request: Any, vocab_size: int) -> None:
    """Check the values of a tokenized request that have to fit a tensor, or to be an index into one.

    Raises:
        ValueError: one does not fit.
    """
    params = request.sampling_params
    if params.top_k > MAX_TOP_K:
        raise ValueError(f"top_k is {params.top_k} and must be at most {MAX_TOP_K}; give -1 for the whole vocabulary")
    for token in params.stop_token_ids or ():
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_token_ids has {token}, which is not one of the {vocab_size} tokens; leave it out")
    if isinstance(request, io_struct.TokenizedEmbeddingReqInput):
        return
    if (start := request.logprob_start_len) < -1:
        raise ValueError(f"logprob_start_len is {start} and must be at least -1; give -1 for the new tokens only")
    if not 0 <= (top := request.top_logprobs_num) <= vocab_size:
        raise ValueError(f"top_logprobs_num is {top} and must be between 0 and the {vocab_size} tokens there are")


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
