"""Check requests before a rank receives them.

Any error in a rank ends the server. So a request that would raise an error in a rank gets an error as its answer
instead. SGLang's own checks come first. The checks here find the bad requests that SGLang's checks let through.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import msgspec
import numpy as np
import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.runtime_context import (
    get_exec,
    get_memory,
    get_observability,
    get_parallel,
    get_schedule,
    get_spec,
)
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from sglang_shift.errors import RequestRefused
from sglang_shift.seams import relies_on

NO_TOKENS = "the request has no tokens; give a text, input_ids or input_embeds that is not empty"

MAX_SAMPLES = 16_384
"""The largest n, for all prompts of a request together. SGLang makes the copies before it checks any other limit."""

MAX_TOP_K = 2**31 - 1
"""The largest top_k. It must fit the int32 tensor that holds it."""


UNCHECKED_FIELDS = (
    "input_ids",
    "input_embeds",
    "mm_inputs",
    "positional_embed_overrides",
    "time_stats",
    "sampling_params",
)
"""Fields of a request that :func:`convert_types` does not check: they may be large, or SGLang itself makes them."""


def check_samples(request: Any) -> None:
    """Check n, because SGLang makes n copies of the request, and answers no other request meanwhile.

    Raises:
        ValueError: n is too large.
    """
    prompts = getattr(request, "text", None) or getattr(request, "input_ids", None)
    number = len(prompts) if isinstance(prompts, list) and prompts and isinstance(prompts[0], (str, list)) else 1
    most = max(1, MAX_SAMPLES // number)
    params = getattr(request, "sampling_params", None)
    for each in params if isinstance(params, list) else [params]:
        n = each.get("n") if isinstance(each, dict) else None
        if isinstance(n, int) and n > most:
            of_all = f", for {number} prompts," if number > 1 else ""
            raise ValueError(f"n is {n}{of_all} and must be at most {most}; send several requests")


def check_kind(request: Any, is_generation: bool) -> None:
    """Check a request to a model that pools. SGLang refuses the opposite: an embedding of a model that generates.

    Args:
        request: The request.
        is_generation: Whether the model generates.

    Raises:
        ValueError: the request asks a model that pools for new tokens, or has an empty list of tokens.
    """
    if is_generation:
        return
    if isinstance(request, io_struct.GenerateReqInput):
        raise ValueError("this model pools and does not generate; send the request to /v1/embeddings or /v1/score")
    if request.input_ids == []:  # SGLang would look for the first token
        raise ValueError(NO_TOKENS)


def check_labels(labels: Any) -> None:
    """Check ``custom_labels``. With ``--enable-metrics``, an unknown label ends the process that counts requests.

    Raises:
        ValueError: a label is unknown.
    """
    for name in labels or ():
        seen = get_observability()
        if seen.enable_metrics and name not in (seen.tokenizer_metrics_allowed_custom_labels or ()):
            raise ValueError(
                f"custom_labels has {name!r}, which is not in --tokenizer-metrics-allowed-custom-labels; leave it out"
            )


def convert_types(request: Any) -> None:
    """Convert each value of a tokenized request to the type of its field: 4.0 becomes 4, and NumPy's 0.7 becomes 0.7.

    SGLang's ranks check types only with ``SGLANG_USE_PICKLE_IPC=0``. The route ``/generate`` checks types earlier. The
    Python API, ``/vertex_generate`` and Ollama's routes accept ``sampling_params`` with values of any type.

    Raises:
        ValueError: a value has another type.
    """
    _convert(request, UNCHECKED_FIELDS)
    _convert(request.sampling_params, ("custom_params",))  # custom_params may hold any values, for custom processors


def _convert(struct: msgspec.Struct, unchecked: Collection[str]) -> None:
    for name, kind in _types(type(struct)).items():
        if name not in unchecked:
            try:
                setattr(struct, name, _converted(getattr(struct, name), kind))
            except msgspec.ValidationError as error:
                raise ValueError(f"{name} has a value of another type than it must have: {error}") from error


def _converted(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return msgspec.convert(_as_json(value), kind, strict=False)


def _as_json(value: Any) -> Any:
    """Replace what JSON does not have by what means the same: numbers of NumPy, and numbers as keys."""
    match value:
        case np.generic() | np.ndarray():
            return value.tolist()
        case dict():
            return {
                str(int(key)) if isinstance(key, (int, np.integer)) else key: _as_json(each)
                for key, each in value.items()
            }
        case list() | tuple():
            return [_as_json(each) for each in value]
    return value


@cache
def _types(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def check_values(request: Any, model: Any) -> None:
    """Check the values of a tokenized request that go into a tensor, or that are an index into a tensor.

    Raises:
        ValueError: a value does not fit.
    """
    vocab_size = model.vocab_size
    if request.positional_embed_overrides is not None:
        check_overrides(request, model)
    if request.input_ids and request.mm_inputs is None:  # a multimodal model's processor adds ids of its own
        check_tokens("input_ids", (min(request.input_ids), max(request.input_ids)), vocab_size)
    params = request.sampling_params
    check_tokens("stop_token_ids", params.stop_token_ids or (), vocab_size)
    if params.top_k > MAX_TOP_K:
        raise ValueError(f"top_k is {params.top_k} and must be at most {MAX_TOP_K}; give -1 for the whole vocabulary")
    if request.token_indices_to_pool is not None:
        check_positions(request)
    if isinstance(request, io_struct.TokenizedEmbeddingReqInput):
        return
    check_beams(params.beam_width or 1)
    check_min_p(params)
    if request.input_embeds is not None:
        check_rows(request.input_embeds, model)
    if request.custom_logit_processor:
        check_logit_processor(request.custom_logit_processor)
    if request.token_indices_to_pool is not None:
        check_logprobs_only(request)
    if (start := request.logprob_start_len) < -1:
        raise ValueError(f"logprob_start_len is {start} and must be at least -1; give -1 for the new tokens only")
    if not 0 <= (top := request.top_logprobs_num) <= vocab_size:
        raise ValueError(f"top_logprobs_num is {top} and must be between 0 and the {vocab_size} tokens there are")


@relies_on(
    "sglang.srt.beam_search.coordinator:BeamCoordinator.validate_and_init",
    "This method refuses beams if a page has several tokens, but a page of shards is larger than it knows.",
)
def check_beams(width: int) -> None:
    """Check the width of a beam search. SGLang's beams need pages of one token, and overlook the pages of shards.

    Raises:
        ValueError: ranks divide the KV cache by token.
    """
    if width > 1 and (shards := get_parallel().dcp_size) > 1:
        raise ValueError(f"beam_width is {width}, but beams need a server without --dcp-size {shards}; leave it out")


@relies_on(
    "sglang.srt.speculative.eagle_utils:eagle_sample",
    "This function chooses the tokens of a step with drafts, and leaves out min_p.",
)
@relies_on(
    "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
    "With --enable-deterministic-inference, this function fails if a request of the step has min_p.",
)
def check_min_p(params: Any) -> None:
    """Check ``min_p``. Greedy requests (SGLang gives them the top_k 1) do not need it.

    Raises:
        ValueError: the server's flags do not combine with it.
    """
    if params.min_p > 0 and get_exec().deterministic.enable_deterministic_inference:
        raise ValueError(
            f"min_p is {params.min_p}, but --enable-deterministic-inference does not have it; leave it out"
        )
    if params.min_p > 0 and params.top_k != 1 and get_spec().speculative_algorithm is not None:
        raise ValueError(f"min_p is {params.min_p}, but --speculative-algorithm does not have it; leave it out")


@relies_on(
    "sglang.srt.speculative.eagle_utils:eagle_sample",
    "This function chooses the tokens of a step with drafts, and leaves out custom logit processors.",
)
def check_logit_processor(text: str) -> None:
    """Make the logit processor of a request, as each rank does. SGLang has checked that the server allows it.

    Raises:
        ValueError: it cannot be made, or it would not be applied.
    """
    if get_spec().speculative_algorithm is not None:
        raise ValueError("custom_logit_processor is not applied with --speculative-algorithm; leave it out")
    try:
        processor = CustomLogitProcessor.from_str(text)
    except Exception as error:  # it is code of the user
        raise ValueError(
            f"custom_logit_processor cannot be made ({type(error).__name__}: {error}); give what the method to_str of "
            "its class returns"
        ) from error
    if not callable(processor):
        raise ValueError("custom_logit_processor cannot be called; derive its class from CustomLogitProcessor")


def check_rows(rows: Any, model: Any) -> None:
    """Check the embeddings of a request.

    Raises:
        ValueError: a row does not have the model's hidden size.
    """
    for row in rows:
        if len(row) != model.hidden_size:
            raise ValueError(f"input_embeds has a row of {len(row)}, but the model's have {model.hidden_size} numbers")


def check_overrides(request: Any, model: Any) -> None:
    """Check rows that replace embeddings of tokens. ``/v1/score`` and ``/v1/embeddings`` take them as JSON.

    A row of one number would not end the step, but PyTorch would repeat the number.

    Raises:
        ValueError: they are no tensors, a row does not have the model's hidden size, or a position is no token's.
    """
    overrides, width = request.positional_embed_overrides, model.hidden_size
    if not isinstance(overrides, PositionalEmbeds):
        raise ValueError("positional_embed_overrides has tensors and cannot be given as JSON; leave it out")
    shape = tuple(getattr(overrides.embeds, "shape", ()))
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(
            f"the embeddings that override tokens have the shape {shape}, but each needs the model's {width} numbers; "
            "correct them"
        )
    if request.mm_inputs is not None:  # a multimodal model's processor adds tokens of its own
        return
    tokens, positions = len(request.input_ids or ()), overrides.positions
    if positions and not 0 <= min(positions) <= max(positions) < tokens:
        raise ValueError(f"positional_embed_overrides has a position not among the {tokens} tokens; correct it")


def check_positions(request: Any) -> None:
    """Check positions at which SGLang reads rows. ``/v1/score`` uses them for ``score_extraction_token_id``.

    Raises:
        ValueError: a position is not in the one step that computes the prompt.
    """
    positions, tokens = request.token_indices_to_pool, request.input_ids or ()
    if get_schedule().chunked_prefill_size != -1 or not get_memory().disable_radix_cache:
        raise ValueError("token_indices_to_pool needs --chunked-prefill-size -1 and --disable-radix-cache; restart")
    if not positions or min(positions) < 0 or max(positions) >= len(tokens):
        raise ValueError(f"token_indices_to_pool has none, or one not among the {len(tokens)} tokens; correct it")


def check_logprobs_only(request: Any) -> None:
    """Check that a request with positions asks for nothing else than logprobs of its prompt.

    Raises:
        ValueError: it asks for more.
    """
    if request.sampling_params.max_new_tokens != 0 or not request.return_logprob or request.logprob_start_len != 0:
        raise ValueError(
            "token_indices_to_pool needs max_new_tokens 0, return_logprob, and logprob_start_len 0; give them as well"
        )


@relies_on(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend",
    "This method collects the rows that the requests of a step replace.",
)
def replace_input_embeds(request: Any) -> None:
    """Turn ``input_embeds`` into tokens whose embeddings SGLang replaces by these rows. The answer is the same.

    In one step, SGLang concatenates only the rows of ``input_embeds``. If another request of the step has token ids,
    its rows are missing, and the step ends the server. Requests with replaced embeddings can share a step with all
    others.
    """
    rows = request.input_embeds
    if rows is None or request.session_params is not None:  # a session takes no input_embeds
        return
    request.input_ids = array("q", [1]) * len(rows)
    request.positional_embed_overrides = PositionalEmbeds(torch.tensor(rows), list(range(len(rows))))
    request.input_embeds = None


def check_folder(folder: str | None) -> None:
    """Check that a profile can be written to ``folder``. The ranks would fail, and end, after they made the profile.

    Raises:
        RequestRefused: it cannot be written there.
    """
    folder = folder or os.environ.get("SGLANG_TORCH_PROFILER_DIR") or "/tmp"  # SGLang has the same default
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise RequestRefused(f"output_dir {folder!r} cannot be written ({error}); give another") from error


def check_logging(level: int | None) -> None:
    """Check ``log_requests_level``. SGLang sets it without a check, and then fails at every request.

    Raises:
        RequestRefused: there is no such level.
    """
    if level is not None and level not in range(4):
        raise RequestRefused(f"log_requests_level is {level} and must be between 0 and 3")


def check_tokens(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Check that each of ``tokens`` is in the vocabulary.

    Raises:
        ValueError: a token is not.
    """
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} has {token}, but the model's tokens are 0 to {vocab_size - 1}; leave it out")


@relies_on("sglang.srt.managers.io_struct:msgpack_decode", "The ranks decode messages with this function.")
def check_message(message: Any) -> None:
    """Encode and decode a message as SGLang does on the way to the ranks. Decoding checks the types of its fields.

    Raises:
        RequestRefused: the message cannot be sent, or a field has another type than it must have.
    """
    if io_struct._USE_PICKLE_IPC or not isinstance(message, msgspec.Struct):
        return
    try:
        io_struct._msgpack_decoder.decode(io_struct.msgpack_encode(message))
    except (TypeError, OverflowError, ValueError) as error:  # msgspec's own errors are ValueErrors
        raise RequestRefused(f"the request cannot be sent to the ranks: {error}; correct that value") from error
