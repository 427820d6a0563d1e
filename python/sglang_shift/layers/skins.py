"""Skins: the model at each level. SGLang builds a model object for a level, and its parameters are views of one copy.

A model object has more than weights: numbers of heads, ranges of the vocabulary, groups. SGLang computes all of them
from the size of tensor parallelism. So SGLang itself builds the object of a level, without memory, on the device
``meta``. Then each parameter becomes a view of the base weights, or the parameter of the model that SGLang has loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.runtime_context import get_flags

from sglang_shift.errors import InstanceRefused
from sglang_shift.layers.embedding import let_rows_replace
from sglang_shift.layers.sp_model import SpModel
from sglang_shift.layers.structure import Structure, needs_order_of_ranks
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.level import Level
from sglang_shift.parallel.topology import Topology, whole_world
from sglang_shift.seams import relies_on
from sglang_shift.weights.base_weights import BaseWeight
from sglang_shift.weights.level_weights import BlockOrder, BlockRows, Blocks, JoinBlocks, LevelWeights


@dataclass(frozen=True)
class Skin:
    """A model at a level.

    Attributes:
        model: SGLang's model.
        sp_model: The model as SP steps of the level run it; None at a level that has no SP.
    """

    model: torch.nn.Module
    sp_model: SpModel | None

    @property
    def forwards(self) -> Forwards:
        """The methods that SP steps run in place of SGLang's."""
        return self.sp_model.forwards if self.sp_model is not None else Forwards()


@dataclass
class WholeWeights:
    """The weights of a model on each rank, as the skins share them.

    To build it is a collective: each rank gathers the whole embeddings.

    Args:
        model: The model that SGLang has loaded at the highest level.
        sp_model: The same model as SP steps run it.
        topology: How SP steps of the whole world divide tokens.

    Attributes:
        bases: The base weights by the names of their linears.
        tables: The embeddings and LM heads that the ranks divide, by their names.

    Raises:
        InstanceRefused: the model has a layer that instances cannot share.
    """

    model: torch.nn.Module
    sp_model: SpModel
    topology: Topology
    structure: Structure = field(init=False)
    bases: dict[str, BaseWeight] = field(init=False)
    tables: dict[str, VocabParallelEmbedding] = field(init=False)

    def __post_init__(self) -> None:
        self.structure = Structure(self.model)
        self._check()
        modules = dict(self.model.named_modules())
        shared = self.sp_model.weights.bases
        self.bases = {name: base for name, m in modules.items() if isinstance(base := shared.get(m), BaseWeight)}
        self.tables = {name: m for name, m in modules.items() if _is_table(m)}
        for name, table in self.tables.items():
            if table.num_added_embeddings:
                raise self.refusal(name, "has rows for adapters")
        everyone = whole_world(self.topology)
        for parameter in self._table_parameters():
            self.sp_model.weights.gather_table(parameter, everyone)

    def _check(self) -> None:
        for name in self.structure.experts:
            raise self.refusal(name, "divides experts")
        for name, module in self.model.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear) and not isinstance(
                self.sp_model.weights.bases.get(module), BaseWeight
            ):
                raise self.refusal(name, "is quantized, or is outside of the layers that SP steps run")

    def refusal(self, layer: str, problem: str, remedy: str = "serve this model without instances") -> Exception:
        """The error for a layer that instances cannot share."""
        return InstanceRefused(
            f"{type(self.model).__name__} has a layer that instances cannot share: {layer} {problem}; {remedy}"
        )

    @property
    def bytes(self) -> int:
        """The memory of all weights on this rank. Each storage counts once."""
        tensors = [tensor for base in self.bases.values() for tensor in base.tensors()]
        tensors += [parameter.data for parameter in self.model.parameters()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def _table_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the tables. An LM head may have the same one as the embedding."""
        parameters = [p for table in self.tables.values() for p in table.parameters(recurse=False)]
        return list({id(p): p for p in parameters}.values())

    def skin(self, level: Level, make: Callable[[], torch.nn.Module], *, pools: bool = False) -> Skin:
        """Build the model of a level.

        Args:
            level: This rank's place at the level.
            make: Makes SGLang's model on the device ``meta``.
            pools: Whether the model pools, and does not generate.

        Raises:
            InstanceRefused: a parameter of the model depends on the level in a way that is not known.
        """
        topology, world = level.topology, self.topology.layout
        if level.size == world.world_size:
            return Skin(self.model, self.sp_model)
        with level.scope(), get_flags().sp.override(enabled=level.has_sp):
            model = make().eval()
            let_rows_replace(model)
            blocks = Blocks.of(world.sp_size, topology.layout.sp_size, topology.sp_index)
            rows = Blocks.of(world.world_size, level.size, level.place)
            strided = blocks.count > 1 and world.base_tp_size > 1
            _Binding(self, model, blocks, rows, strided).bind()
            if not level.has_sp:
                return Skin(model, None)
            tensors = {name: (base.weight, base.bias) for name, base in self.bases.items()}
            weights = LevelWeights(model, level.topology, tensors)
            return Skin(model, SpModel(model, level.topology, pools=pools, weights=weights))


@dataclass(frozen=True)
class _Binding:
    """Gives a model of a level the weights of this rank.

    Attributes:
        whole: The weights.
        model: The model of the level.
        blocks: This rank's part of the linears.
        rows: This rank's part of the tables, as SGLang divides them.
        strided: Whether the blocks are not neighbours in the model. Then nothing may depend on the order of the ranks.
    """

    whole: WholeWeights
    model: torch.nn.Module
    blocks: Blocks
    rows: Blocks
    strided: bool

    def bind(self) -> None:
        originals = dict(self.whole.model.named_modules())
        for name, module in self.model.named_modules():
            original = originals.get(name)
            if type(original) is not type(module):
                raise self.whole.refusal(name, "exists at some levels only")
            if name in self.whole.bases:
                self._bind_linear(name, module, original)
            elif name in self.whole.tables:
                self._bind_table(name, module, original)
            else:
                self._share(name, module, original)
            self._share_tensors(name, module, original)

    def _bind_linear(self, name: str, linear: Any, original: Any) -> None:
        if self.strided and needs_order_of_ranks(linear):
            raise self._order_refusal(name, "puts the parts of all ranks side by side")
        base, dim = self.whole.bases[name], 0 if isinstance(linear, ColumnParallelLinear) else 1
        tensors = {"weight": self.blocks.of_tensor(base.weight, dim)}
        if base.bias is not None:
            tensors["bias"] = self.blocks.of_tensor(base.bias, 0) if dim == 0 else base.bias
        self._set(name, linear, tensors)
        if self.blocks.count > 1:
            self._add_hooks(name, linear, original)

    @relies_on(
        "sglang.srt.layers.linear:ColumnParallelLinear.forward",
        "This method returns the product and the bias, so a hook can order the columns of the product.",
    )
    @relies_on(
        "sglang.srt.layers.linear:RowParallelLinear.forward",
        "This method takes the rows as its first argument, so a hook can join the blocks of a row.",
    )
    def _add_hooks(self, name: str, linear: Any, original: Any) -> None:
        """Let a linear with several blocks return and take what SGLang's code around it expects."""
        in_attention = name not in self.whole.structure.linears
        if isinstance(linear, RowParallelLinear):
            if not in_attention and linear.input_is_parallel:
                linear.register_forward_pre_hook(JoinBlocks(linear.input_size_per_partition))
            return
        parts = list(original.output_partition_sizes)
        if len(parts) == 1:
            return  # the blocks of one part follow each other as SGLang expects
        if linear.gather_output:
            raise self.whole.refusal(name, "gathers an output of several parts")
        hook = BlockOrder(parts, self.blocks.count) if in_attention else BlockRows(sum(parts))
        linear.register_forward_hook(hook)

    def _bind_table(self, name: str, table: Any, original: Any) -> None:
        parameters = dict(original.named_parameters(recurse=False))
        self._set(name, table, {key: self.rows.of_tensor(p.shift_base, 0) for key, p in parameters.items()})

    def _set(self, name: str, module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Replace all parameters of a module by views."""
        parameters = {key: p for key, p in module._parameters.items() if p is not None}
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        if shapes != {key: parameter.shape for key, parameter in parameters.items()}:
            raise self.whole.refusal(name, "has weights of other shapes than its blocks have")
        for key, tensor in tensors.items():
            module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)

    def _share(self, name: str, module: torch.nn.Module, original: torch.nn.Module) -> None:
        """Let both modules have the same parameters: those that every rank has whole.

        A norm of all heads gathers them in the order of the ranks, and its weight has the order of the model.
        """
        if self.strided and (attention := self.whole.structure.attention.get(name.rpartition(".")[0])) is not None:
            head = max(each.head_dim for each in attention.children() if isinstance(each, RadixAttention))
            if any(each is not None and each.numel() > head for each in module._parameters.values()):
                raise self._order_refusal(name, "has weights for all heads together")
        for key, parameter in module._parameters.items():
            whole = original._parameters[key]
            if (parameter is None) != (whole is None) or (whole is not None and parameter.shape != whole.shape):
                raise self.whole.refusal(name, f"divides its parameter {key!r} among the ranks")
            module._parameters[key] = whole

    def _order_refusal(self, name: str, problem: str) -> Exception:
        """The error for a layer that needs the blocks of the ranks in the order of the model."""
        layout = self.whole.topology.layout
        order = f"but with --sp-size {layout.sp_size} the ranks do not have them in the order of the model"
        return self.whole.refusal(name, f"{problem}, {order}", f"give --sp-size {layout.world_size}")

    def _share_tensors(self, name: str, module: torch.nn.Module, original: torch.nn.Module) -> None:
        """Let both modules have the same tensors besides their parameters."""
        for mine, theirs in ((module._buffers, original._buffers), (vars(module), vars(original))):
            for key, tensor in mine.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if tensor.shape != theirs[key].shape:
                    raise self.whole.refusal(name, f"divides its tensor {key!r} among the ranks")
                mine[key] = theirs[key]


def _is_table(module: torch.nn.Module) -> bool:
    return isinstance(module, VocabParallelEmbedding) and module.tp_size > 1
