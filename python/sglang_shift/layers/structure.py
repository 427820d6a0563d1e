"""Find the layers of a decoder that SP steps run in another way. The structure of the model decides, never its name.

- An *attention module* has a ``RadixAttention`` among its children. Its column-parallel linears come before the first
  exchange of a layer, and its row-parallel linear comes after the second one.
- A *stack* is a list of layers with attention modules. The other parallel linears of a stack compute this rank's
  tokens.
- The embeddings of the decoder are those nearest to the stacks. A vision tower may have others, for positions.
- What is in no stack (a vision tower, for example) runs outside of the token-sharded region.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear, get_group_rank_size
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from sglang_shift.errors import Refusal
from sglang_shift.seams import relies_on

RECURRENT = ("sglang.srt.layers.radix_linear_attention", "sglang.srt.layers.attention.mamba")
"""Modules of SGLang with layers that go through a sequence token by token."""
HEADS_OF_LATENTS = ("q_b_proj", "kv_b_proj")
"""The names of the linears of MLA that compute heads from latents, in every model of SGLang."""

UNKNOWN_LAYER = Refusal(
    "{model} has a layer that SP mode cannot run: {layer} {problem}; serve this model without --sp-size and "
    "--enable-shift-parallel",
    "A rank checks this after loading. The linears before and after attention must be in the same module as the "
    "attention. They must not gather their output, split their input, or return their bias instead of adding it. A "
    "recurrent layer (Mamba, linear attention) needs whole sequences on each rank.",
)
NO_ATTENTION = Refusal(
    "{model} has no list of layers with SGLang's attention, so SP mode cannot divide it; serve this model without "
    "--sp-size and --enable-shift-parallel",
    "A rank checks this after loading. Attention must be a `RadixAttention`.",
)
NO_EXPERTS = Refusal(
    "--shift-experts replicated has no meaning for {model}, which has no experts that SP mode knows; leave it out",
    "A rank checks this after loading. Experts must be a `FusedMoE`.",
)


class Structure:
    """The parts of a decoder by their kind, in the order of the model's modules.

    Args:
        model: A loaded SGLang model.

    Attributes:
        model: The model.
        attention: The attention modules.
        linears: The parallel linears of the stacks outside of attention, with their names.
        routers: The routers of experts.
        experts: The routed experts, with their names.
        embeddings: The embeddings of the decoder, without LM heads.
        logits: The logits processors.
        stacks: The names of the stacks.

    Raises:
        Refused: the model has no attention that SP mode knows, or a recurrent layer.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        attention = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
        self.stacks = stacks = [name for name, module in model.named_modules() if _is_stack(name, module, attention)]
        if not stacks:
            raise NO_ATTENTION(model=type(model).__name__)
        self.attention = dict(attention)
        inside = {id(child) for _, module in attention for child in module.children()}
        self.linears: dict[str, Any] = {}
        self.routers: list[Any] = []
        self.experts: dict[str, Any] = {}
        embeddings: dict[str, torch.nn.Module] = {}
        self.logits: list[torch.nn.Module] = []
        for name, module in model.named_modules():
            in_stack = any(name.startswith(stack + ".") for stack in stacks)
            if in_stack and _is_recurrent(module):
                raise self.refusal(name, "is recurrent")
            if in_stack and is_parallel_linear(module) and id(module) not in inside:
                self.linears[name] = module
            elif in_stack and isinstance(module, TopK):
                self.routers.append(module)
            elif in_stack and isinstance(module, FusedMoE):
                self.experts[name] = module
            elif isinstance(module, VocabParallelEmbedding | torch.nn.Embedding):
                if not isinstance(module, ParallelLMHead):
                    embeddings[name] = module
            elif isinstance(module, LogitsProcessor):
                self.logits.append(module)
        self.embeddings = _nearest(embeddings, [stack.rpartition(".")[0] for stack in stacks])

    def refusal(self, layer: str, problem: str) -> Exception:
        """The error for a layer that SP mode cannot run."""
        return UNKNOWN_LAYER(model=type(self.model).__name__, layer=layer, problem=problem)

    def decoders(self) -> list[torch.nn.Module]:
        """The modules that have the stacks, and the norm after each stack.

        Raises:
            Refused: the model itself has a stack, so it does not return the hidden states.
        """
        inner = [name for name in self.stacks if any(name.startswith(other + ".") for other in self.stacks)]
        owners = {name.rpartition(".")[0] for name in self.stacks if name not in inner}
        if "" in owners:
            raise self.refusal("the model", "pools without a module that returns its hidden states")
        return [self.model.get_submodule(name) for name in sorted(owners)]

    def experts_to_replicate(self) -> dict[str, Any]:
        """The routed experts, of which each rank is to get the parts of its SP group.

        Raises:
            Refused: the model has none.
        """
        if not self.experts:
            raise NO_EXPERTS(model=type(self.model).__name__)
        return self.experts

    def linears_of(self, name: str) -> Iterator[tuple[str, Any]]:
        """The parallel linears of the attention module of this name, with their own names.

        Raises:
            Refused: SP mode cannot run one of them.
        """
        for child_name, child in self.attention[name].named_children():
            if not is_parallel_linear(child):
                continue
            if problem := _problem_in_attention(child):
                raise self.refusal(f"{name}.{child_name}", problem)
            yield child_name, child

    @relies_on(
        "sglang.srt.layers.layer_boundary.stage:StageBoundary._prepare",
        "This method hands the latents' method of its plan to the attention, and only the attention calls it.",
    )
    def boundaries_of(self, attention: torch.nn.Module) -> list[Any]:
        """The boundaries of SGLang's layers that compute the latents of this attention module by its method.

        Raises:
            Refused: there is none, so it is not known who computes the latents.
        """
        values = [value for module in self.model.modules() for value in vars(module).values() if hasattr(value, "plan")]
        methods = [getattr(value.plan, "qkv_latent_func", None) for value in values]
        found = [v for v, method in zip(values, methods, strict=True) if getattr(method, "__self__", None) is attention]
        if not found:
            name = next(name for name, module in self.attention.items() if module is attention)
            raise self.refusal(name, "computes its latents in a place that SP mode does not know")
        return found


def is_parallel_linear(module: torch.nn.Module) -> bool:
    """Whether TP ranks divide this linear among themselves."""
    return isinstance(module, ColumnParallelLinear | RowParallelLinear) and get_group_rank_size(module.tp_group)[1] > 1


def needs_order_of_ranks(linear: Any) -> bool:
    """Whether a linear puts the outputs of all TP ranks side by side, or takes this rank's part of a whole input."""
    return getattr(linear, "gather_output", False) or not getattr(linear, "input_is_parallel", True)


def returns_shard_of_bias(linear: Any) -> bool:
    """Whether a linear returns this TP rank's part of a bias, so that the model adds it."""
    return isinstance(linear, ColumnParallelLinear) and linear.skip_bias_add and linear.bias is not None


def _is_attention(module: torch.nn.Module) -> bool:
    return any(isinstance(child, RadixAttention) for child in module.children())


def _is_stack(name: str, module: torch.nn.Module, attention: list[tuple[str, torch.nn.Module]]) -> bool:
    return isinstance(module, torch.nn.ModuleList) and any(each.startswith(name + ".") for each, _ in attention)


def _nearest(modules: dict[str, torch.nn.Module], owners: list[str]) -> list[torch.nn.Module]:
    """The modules that have the longest path in common with a module that has a stack."""

    def in_common(name: str) -> int:
        paths = [zip(name.split("."), owner.split("."), strict=False) for owner in owners]
        return max(len(list(takewhile(lambda pair: pair[0] == pair[1], path))) for path in paths)

    longest = max(map(in_common, modules), default=0)
    return [module for name, module in modules.items() if in_common(name) == longest]


def _is_recurrent(module: torch.nn.Module) -> bool:
    return any(cls.__module__.startswith(RECURRENT) for cls in type(module).__mro__)


def _problem_in_attention(linear: Any) -> str | None:
    if needs_order_of_ranks(linear):
        return "gathers its output or splits its input"
    return "returns its bias instead of adding it" if returns_shard_of_bias(linear) else None
