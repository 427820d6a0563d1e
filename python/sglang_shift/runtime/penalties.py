"""Gives penalties the tokens that a request had before it was retracted. SGLang's penalties forget them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.penaltylib.frequency_penalty import BatchedFrequencyPenalizer
from sglang.srt.sampling.penaltylib.min_new_tokens import BatchedMinNewTokensPenalizer
from sglang.srt.sampling.penaltylib.presence_penalty import BatchedPresencePenalizer
from sglang.srt.sampling.penaltylib.repetition_penalty import BatchedRepetitionPenalizer

from sglang_shift.seams import relies_on


def seed_penalties(batch: ScheduleBatch) -> None:
    """Let the penalties of a prefill batch count the tokens that its requests have produced already.

    Args:
        batch: A batch that SGLang has prepared for its prefill. It may also have requests that decode.
    """
    orchestrator = batch.sampling_info.penalizer_orchestrator
    if not orchestrator.is_required:
        return
    prefills = len(batch.reqs) - len(batch.decoding_reqs or ())
    for row, req in enumerate(batch.reqs[:prefills]):
        if req.output_ids:
            tokens = torch.tensor(counted_tokens(req, overlap=batch.enable_overlap), device=batch.device)
            for kind, penalizer in orchestrator.penalizers.items():
                if penalizer.is_prepared():
                    SEEDS[kind](penalizer, row, tokens)


@relies_on(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.cumulate_penalty_output_tokens",
    "This method gives each penalty the last token that is known when a step is prepared.",
)
def counted_tokens(req: Req, *, overlap: bool) -> list[int]:
    """The tokens that SGLang's penalties have counted when they apply to the next token of a request.

    With overlap scheduling, a step is prepared before the token of the step before is known. So the penalties count one
    token late, and begin with the last one of the prompt.
    """
    tokens = list(req.output_ids)
    return [req.origin_input_ids[-1], *tokens[:-1]] if overlap else tokens


@relies_on(
    "sglang.srt.sampling.penaltylib.frequency_penalty:BatchedFrequencyPenalizer._cumulate_output_tokens",
    "This method adds the penalty of a request for each of its tokens.",
)
def _seed_frequency(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalties = penalizer.frequency_penalties[row].expand(len(tokens))
    penalizer.cumulated_frequency_penalties[row].scatter_add_(0, tokens, penalties)


@relies_on(
    "sglang.srt.sampling.penaltylib.presence_penalty:BatchedPresencePenalizer._cumulate_output_tokens",
    "This method sets the penalty of a request for each of its tokens.",
)
def _seed_presence(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.cumulated_presence_penalties[row, tokens] = penalizer.presence_penalties[row]


@relies_on(
    "sglang.srt.sampling.penaltylib.repetition_penalty:BatchedRepetitionPenalizer._cumulate_output_tokens",
    "This method sets the factor of a request for each of its tokens.",
)
def _seed_repetition(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.cumulated_repetition_penalties[row, tokens] = penalizer.repetition_penalties[row]


@relies_on(
    "sglang.srt.sampling.penaltylib.min_new_tokens:BatchedMinNewTokensPenalizer._cumulate_output_tokens",
    "This method counts the tokens of a request.",
)
def _seed_length(penalizer: Any, row: int, tokens: torch.Tensor) -> None:
    penalizer.len_output_tokens[row] += len(tokens)


SEEDS: dict[Any, Callable[[Any, int, torch.Tensor], None]] = {
    BatchedFrequencyPenalizer: _seed_frequency,
    BatchedPresencePenalizer: _seed_presence,
    BatchedRepetitionPenalizer: _seed_repetition,
    BatchedMinNewTokensPenalizer: _seed_length,
}
