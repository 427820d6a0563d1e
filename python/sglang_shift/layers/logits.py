"""The end of a model in SP steps: a step leaves the token-sharded region here.

A model that generates leaves it in the logits processor, before the LM head. A model that pools leaves it after its
layers.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_shift.parallel.region import exit_gather
from sglang_shift.parallel.step import Step, current_step
from sglang_shift.seams import relies_on

NOT_ENTERED = (
    "the model has computed a step in SP without an embedding that sglang_shift knows, so each rank computed all "
    "tokens; serve this model without --sp-size and --enable-shift-parallel"
)


class ExitToLogits:
    """SGLang's logits processor. It gets all rows that the LM head reads.

    Args:
        processor: SGLang's ``LogitsProcessor``.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    @relies_on(
        "sglang.srt.layers.logits_processor:LogitsProcessor.forward",
        "This method takes the rows of all tokens as its input.",
    )
    def __call__(
        self,
        input_ids: Any,
        hidden_states: torch.Tensor,
        lm_head: Any,
        logits_metadata: Any,
        aux_hidden_states: Any = None,
        hidden_states_before_norm: torch.Tensor | None = None,
    ) -> Any:
        """Gather the rows of each tensor, leave the region, and run SGLang's processor."""
        step = current_step()
        hidden_states = leave(step, hidden_states)
        if hidden_states_before_norm is not None:
            hidden_states_before_norm = exit_gather(step, hidden_states_before_norm)
        if aux_hidden_states is not None:
            aux_hidden_states = gather_aux(step, aux_hidden_states)
        step.leave()
        return type(self.processor).forward(
            self.processor,
            input_ids,
            hidden_states,
            lm_head,
            logits_metadata,
            aux_hidden_states,
            hidden_states_before_norm,
        )


class ExitAfterLayers:
    """The decoder inside of a model that pools: an embedding model, a reward model, or a classifier.

    The decoder has the layers and the final norm. What follows it differs among models: heads before or after a pooler,
    or several poolers. All of it gets the rows of all tokens, as in TP.

    Args:
        decoder: The module that has the list of layers.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.decoder = decoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder, gather all rows of what it returns, and leave the region."""
        step = current_step()
        output = type(self.decoder).forward(self.decoder, *args, **kwargs)
        step.exit_plan = None
        if isinstance(output, torch.Tensor):
            output = leave(step, output)
        else:
            output = tuple(leave(step, each) if isinstance(each, torch.Tensor) else each for each in output)
        step.leave()
        return output


def leave(step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
    """Gather the rows that leave the region.

    Args:
        step: The step, inside of the region.
        hidden_states: ``[T_local, h]``.

    Returns:
        ``[T, h]``. The rows that the LM head (or a capture) reads have values. The other rows are zeros.

    Raises:
        RuntimeError: the step has not entered the region.
    """
    if not step.inside:
        raise RuntimeError(NOT_ENTERED)
    return exit_gather(step, hidden_states)


def gather_aux(step: Step, aux_hidden_states: Any) -> Any:
    """Gather the hidden states of single layers, which a draft model reads: a tensor, or a list of tensors."""
    if isinstance(aux_hidden_states, torch.Tensor):
        return exit_gather(step, aux_hidden_states)
    return type(aux_hidden_states)(exit_gather(step, each) for each in aux_hidden_states)
