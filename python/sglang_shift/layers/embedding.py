"""The embeddings in SP steps: a step enters the token-sharded region here."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_shift.layers.structure import Structure
from sglang_shift.parallel.region import enter, local_rows, sum_rows
from sglang_shift.parallel.step import Step, current_step
from sglang_shift.seams import relies_on


class _Lookup:
    """The lookup of an embedding in SP steps.

    Args:
        table: SGLang's or PyTorch's embedding.
    """

    def __init__(self, table: torch.nn.Module) -> None:
        self.table = table

    @relies_on(
        "sglang.srt.model_executor.model_runner:ModelRunner._extend_forward_kwargs",
        "If a request replaces some embeddings, this method calls the embedding for all tokens.",
    )
    def __call__(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Look up ``ids``, ``[T]``, equal on every rank. Return this rank's rows, ``[ceil(T / S), h]``."""
        step = current_step()
        if not step.inside:
            if getattr(step.batch, "replace_embeds", None) is not None:
                return self.stock(ids, *args, **kwargs)  # the model runner enters the region after the replacement
            enter(step, ids.shape[0], ids.device)
        return self.lookup(ids, step, *args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the table's own ``forward``."""
        rows: torch.Tensor = type(self.table).forward(self.table, *args, **kwargs)
        return rows

    def lookup(self, ids: torch.Tensor, step: Step, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return this rank's rows."""
        raise NotImplementedError


class ShardedLookup(_Lookup):
    """A lookup in a table whose rows the TP ranks divide."""

    @relies_on(
        "sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward",
        "This method sums the rows that _embed_local_shard returns, and does nothing else.",
    )
    def lookup(self, ids: torch.Tensor, step: Step, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Each rank looks up all tokens in its part of the table. Then each rank sums the rows of its own tokens.

        The row of a token comes from one rank, and is zero on all other ranks. So the sum is exact in any order.
        """
        assert isinstance(self.table, VocabParallelEmbedding)
        return sum_rows(step, self.table._embed_local_shard(ids))


class WholeLookup(_Lookup):
    """A lookup in a table that every rank has."""

    def lookup(self, ids: torch.Tensor, step: Step, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Look up this rank's tokens only. Rows beyond T are those of token 0, and nothing reads them."""
        return self.stock(local_rows(step, ids), *args, **kwargs)


def lookup_for(table: torch.nn.Module) -> _Lookup:
    """Make the lookup for an embedding of the model."""
    sharded = isinstance(table, VocabParallelEmbedding) and table.tp_size > 1
    return ShardedLookup(table) if sharded else WholeLookup(table)


@relies_on(
    "sglang.srt.model_executor.model_runner:ModelRunner._extend_forward_kwargs",
    "If a request replaces some embeddings, this method asks the model for its table, and gives the rows to the model.",
)
def let_rows_replace(model: torch.nn.Module) -> bool:
    """Make sure that SGLang finds the table of a model, because many of its classes have no method that returns it.

    Returns:
        Whether a step can start from rows in place of tokens.
    """
    parameters = inspect.signature(type(model).forward).parameters.values()
    if not any(each.name == "input_embeds" or each.kind is each.VAR_KEYWORD for each in parameters):
        return False
    if _returns_table(model):
        return True
    tables = Structure(model).embeddings
    if len(tables) != 1:  # the table of positions may be beside it
        return False
    name = next(name for name, module in model.named_modules() if module is tables[0])
    model.get_input_embeddings = lambda: model.get_submodule(name)  # LoRA may have put a wrapper in its place
    return True


def _returns_table(model: Any) -> bool:
    try:
        return callable(model.get_input_embeddings())
    except (AttributeError, TypeError):  # some classes have a method of this name that takes ids
        return False
