"""The model as SP steps run it: for some of SGLang's modules, another forward, with the base weights."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.runtime_context import get_parallel

from sglang_shift.layers.embedding import lookup_for
from sglang_shift.layers.experts import Experts, ReplicatedExperts, Router, sum_at_once
from sglang_shift.layers.latent import GatheredAttention, GatheredLatents
from sglang_shift.layers.linear import (
    ColumnProjection,
    HeadsProjection,
    OutputProjection,
    Projection,
    QkvProjection,
    RowProjection,
)
from sglang_shift.layers.logits import ExitAfterLayers, ExitToLogits
from sglang_shift.layers.streams import run_on_one_stream
from sglang_shift.layers.structure import HEADS_OF_LATENTS, Structure, returns_shard_of_bias
from sglang_shift.layers.sums import SumOfCompleteRows
from sglang_shift.parallel.exchange.base import ExchangeVolume, SequenceExchange
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.topology import Topology
from sglang_shift.weights.base_weights import BaseWeights


class SpModel:
    """The model as SP steps run it.

    To build it is a collective: all ranks do so after SGLang has loaded the model.

    Args:
        model: A loaded SGLang model whose linears hold stock full-TP shards.
        topology: The groups that share the weights.
        replicate_experts: Whether each rank gets the experts' parts of all ranks of its SP group.
        pools: Whether the model pools, and does not generate.
        weights: Where the base weights come from; None to gather them from the shards.

    Attributes:
        weights: The base weights of its linears.
        forwards: The methods that SP steps run in place of SGLang's, and other attributes of SP steps.
        projections: The linears that have base weights.

    Raises:
        Refused: SP mode cannot run a layer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        topology: Topology,
        *,
        replicate_experts: bool = False,
        pools: bool = False,
        weights: BaseWeights | None = None,
    ) -> None:
        self.topology = topology
        self.weights = weights or BaseWeights(model, topology)
        self.forwards = Forwards()
        self.projections: list[Projection] = []
        structure = Structure(model)
        for name in structure.attention:
            self._add_attention(structure, name)
        for name, linear in structure.linears.items():
            if returns_shard_of_bias(linear):
                raise structure.refusal(name, "returns its bias instead of adding it")
            self._add_projection(linear, ColumnProjection if _is_column(linear) else RowProjection, name)
        self.weights.release_unused()
        if replicate_experts:
            for name, experts in structure.experts_to_replicate().items():
                self.forwards.replace(experts, ReplicatedExperts(experts, self.weights.stack_experts(experts, name)))
        else:
            for router in structure.routers:
                self.forwards.replace(router, Router(router))
            for experts in structure.experts.values():
                self.forwards.replace(experts, Experts(experts))
        for experts in structure.experts.values():
            sum_at_once(experts, self.forwards)
        if topology.base_tp_group is not None:
            run_on_one_stream(model, self.forwards)
        for embedding in structure.embeddings:
            self.forwards.replace(embedding, lookup_for(embedding))
        self._add_exit(structure, pools)
        for group in _sum_groups():
            self.forwards.replace(group, SumOfCompleteRows(group), "all_reduce")

    def _add_exit(self, structure: Structure, pools: bool) -> None:
        """Add the places at which a step leaves the region."""
        if pools:
            for decoder in structure.decoders():
                self.forwards.replace(decoder, ExitAfterLayers(decoder))
        else:
            for processor in structure.logits:
                self.forwards.replace(processor, ExitToLogits(processor))

    def _add_attention(self, structure: Structure, name: str) -> None:
        """Add the linears of an attention module, and the latents if it has MLA."""
        attention: Any = structure.attention[name]
        latent = hasattr(attention, "kv_lora_rank")
        prepares = latent and hasattr(attention, "prepare_qkv_latent")
        linears = list(structure.linears_of(name))
        if len({_is_column(linear) for _, linear in linears}) < 2:
            raise structure.refusal(name, "lacks a linear of its own before or after its attention")
        for child_name, linear in linears:
            if not _is_column(linear):
                self._add_projection(linear, OutputProjection, f"{name}.{child_name}")
            elif latent and (child_name in HEADS_OF_LATENTS or not prepares):
                self.forwards.replace(linear, HeadsProjection(linear))
            else:
                self._add_projection(linear, QkvProjection, f"{name}.{child_name}")
        if latent and not prepares:
            self.forwards.replace(attention, GatheredAttention(attention))
        elif latent and attention.q_lora_rank is not None:
            for boundary in structure.boundaries_of(attention):
                self.forwards.replace(boundary.plan, GatheredLatents(attention.prepare_qkv_latent), "qkv_latent_func")
        elif latent:
            latents = attention.kv_a_proj_with_mqa
            self.forwards.replace(latents, GatheredLatents(latents.forward))

    def _add_projection(self, linear: Any, kind: type[Projection], name: str) -> None:
        projection = kind(linear, self.weights.assemble(linear, name))
        self.projections.append(projection)
        self.forwards.replace(linear, projection)

    @property
    def exchange_columns(self) -> list[int]:
        """For each exchange around attention in a step, the columns of a token that one rank sends and receives."""
        size = self.topology.layout.sp_size
        columns = [
            p.base.outputs if isinstance(p, QkvProjection) else p.base.inputs
            for p in self.projections
            if isinstance(p, QkvProjection | OutputProjection)
        ]
        return [each // size for each in columns]

    def exchange_volume(self, exchange: SequenceExchange, dtype: torch.dtype) -> ExchangeVolume:
        """How much the exchanges around attention send in one step.

        They send Q, K and V after each QKV projection, and O before each output projection.

        Args:
            exchange: The exchange of the steps.
            dtype: The type of activations.
        """
        columns = self.exchange_columns
        row_bytes = sum(exchange.row_bytes(each, dtype.itemsize) for each in columns)
        return ExchangeVolume(self.topology.layout.sp_size, len(columns), row_bytes)


def _is_column(linear: Any) -> bool:
    return isinstance(linear, ColumnParallelLinear)


def _sum_groups() -> list[GroupCoordinator]:
    """SGLang's groups over which a model may sum the parts of TP ranks."""
    parallel = get_parallel()
    groups = (parallel.tp_group, parallel.attn_tp_group, parallel.moe_tp_group, parallel.moe_ep_group)
    return list({id(group): group for group in groups if group is not None and group.world_size > 1}.values())
