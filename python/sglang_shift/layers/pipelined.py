"""Attention modules in SP steps that exchange their heads group by group.

Between the exchanges, SGLang's modules of the families normalize and rotate each head apart, and then call attention.
So this code can do the same for a group of heads, with the parts of SGLang's module.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_shift.layers.linear import OutputProjection, QkvProjection
from sglang_shift.layers.sp_model import SpModel
from sglang_shift.models.families import family_of
from sglang_shift.models.heads import Heads
from sglang_shift.parallel.exchange.head_groups import HeadGroups
from sglang_shift.parallel.exchange.pipeline import HeadPipeline
from sglang_shift.parallel.step import current_step
from sglang_shift.seams import relies_on


class PipelinedAttention:
    """An attention module whose heads travel group by group, in the steps that ask for it.

    Args:
        attention: SGLang's module.
        core: The ``RadixAttention`` of the module.
        qkv: Its projection before attention.
        output: Its projection after attention.
        qk_norm: Whether the queries and keys of each head are normalized.
    """

    def __init__(
        self, attention: Any, core: RadixAttention, qkv: QkvProjection, output: OutputProjection, *, qk_norm: bool
    ) -> None:
        self.attention, self.core, self.qkv, self.output, self.qk_norm = attention, core, qkv, output, qk_norm
        self.groups = HeadGroups.of(Heads(core.tp_q_head_num, core.tp_k_head_num), core.head_dim)

    @relies_on("sglang.srt.models.llama:LlamaAttention.forward", "Our method does the same for each group of heads.")
    @relies_on(
        "sglang.srt.models.llama:LlamaAttention.forward_prepare_native", "Our method does the same for each group."
    )
    @relies_on("sglang.srt.models.qwen2:Qwen2Attention.forward", "Our method does the same for each group of heads.")
    @relies_on("sglang.srt.models.qwen3:Qwen3Attention.forward", "Our method does the same for each group of heads.")
    def __call__(self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        """``[T_local, h]`` to ``[T_local, h]``, as SGLang's ``forward``."""
        step = current_step()
        if not step.pipelined:
            out: torch.Tensor = type(self.attention).forward(self.attention, positions, hidden_states, forward_batch)
            return out
        step.in_attention, step.gathered = True, None
        # Matrix products of few rows are slow on GPUs.
        exchange = HeadPipeline(step.topology.sp_group, self.groups, in_parts=hidden_states.is_cpu)
        exchange.scatter(hidden_states, self.qkv.base.columns, self.qkv.base.outputs)
        new: list[torch.Tensor] = []
        for group in range(self.groups.count):
            arrived = exchange.arrived(group)[: step.num_tokens]
            exchange.send_back(group, self._attend(group, arrived, new, positions, forward_batch))
        step.in_attention = False
        rows = exchange.gather(partial(self.output.part_of_sum, step=step))
        return step.topology.base_all_reduce(rows)

    @relies_on(
        "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend",
        "It takes the number of query heads from the layer, and writes no keys if save_kv_cache is False.",
    )
    def _attend(
        self, group: int, arrived: torch.Tensor, new: list[torch.Tensor], positions: torch.Tensor, batch: Any
    ) -> torch.Tensor:
        """Attention of a group, ``[T, columns]``.

        The first group writes the keys and values to the KV cache, and to ``new``. The other groups attend to these:
        those of the cache may be rounded to 8 bits.
        """
        width, heads = self.groups.width, self.groups.query_heads(group)
        core = copy.copy(self.core)
        core.tp_q_head_num = heads
        if group:
            # SGLang rotates queries and keys in one call. The keys of this call are not used.
            unused = arrived.new_zeros(arrived.shape[0], width)
            query, _ = self._rotate(positions, arrived, unused)
            output: torch.Tensor = core(query, *new, batch, save_kv_cache=False)
            return output
        kv = width * self.groups.heads.kv
        query, key, value = arrived.split([width * heads, kv, kv], dim=-1)
        query, key = self._rotate(positions, query, key)
        new += [key, value]
        output = core(query, key, value, batch)
        return output

    @relies_on(
        "sglang.srt.models.qwen3:Qwen3Attention.forward_prepare_native", "Our method normalizes and rotates like it."
    )
    def _rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalize and rotate queries and keys."""
        module = self.attention
        if self.qk_norm:
            from sglang.srt.models.utils import apply_qk_norm

            query, key = apply_qk_norm(query, key, module.q_norm, module.k_norm, module.head_dim)
        query, key = module.rotary_emb(positions, query, key)
        return query, key


def add_pipelines(model: torch.nn.Module, sp_model: SpModel) -> HeadGroups:
    """Let SP steps exchange heads group by group, if they ask for it.

    Args:
        model: A loaded model of a family.
        sp_model: The model as SP steps run it.

    Returns:
        The groups of the model's layers.
    """
    family = family_of(model)
    assert family is not None, "the start-up checks refuse other models"
    by_linear = {id(projection.linear): projection for projection in sp_model.projections}
    pipelines = []
    for module in model.modules():
        children = list(module.children())
        cores = [child for child in children if isinstance(child, RadixAttention)]
        if not cores:
            continue
        projections = [by_linear[id(child)] for child in children if id(child) in by_linear]
        qkv, output = sorted(projections, key=lambda each: isinstance(each, OutputProjection))
        assert isinstance(qkv, QkvProjection)
        assert isinstance(output, OutputProjection)
        pipelines.append(PipelinedAttention(module, cores[0], qkv, output, qk_norm=family.qk_norm))
        sp_model.forwards.replace(module, pipelines[-1])
    return pipelines[0].groups
