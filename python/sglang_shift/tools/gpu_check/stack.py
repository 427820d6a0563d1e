"""Runs a few decoder layers of one rank in both modes, on one device. All ranks of its group are alike.

The projections and the exchange are this package's own. Every rank holds the same shards and the same tokens. So the
block that comes from rank j equals the block that this rank would send to itself. A sum over n ranks is n times the
rank's own part. A copy on the device, with the same number of bytes, replaces the links. Both modes compute what such a
group would compute, so their results are the same.

The rotary embedding is left out, because it is the same in both modes. Attention is PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_shift.layers.linear import ColumnProjection, OutputProjection, QkvProjection, RowProjection
from sglang_shift.modes import Mode
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.step import Step
from sglang_shift.parallel.topology import Topology
from sglang_shift.tools.gpu_check.shapes import ROW_PARALLEL, Deployment
from sglang_shift.weights.base_weights import BaseWeight

PROJECTIONS = {"qkv": QkvProjection, "o": OutputProjection, "gate_up": ColumnProjection, "down": RowProjection}


class ReplicatedGroup:
    """A group of ranks that all hold the same weights and tokens."""

    rank_in_group = 0
    device_group = None

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Fill the output as if every rank sent its block 0 to this rank."""
        output.view(self.world_size, -1).copy_(input.view(self.world_size, -1)[0])

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` times the number of ranks."""
        return x * self.world_size


@dataclass(frozen=True)
class Batch:
    """The batch of a step.

    Attributes:
        requests: Number of requests, a multiple of S. Each rank carries 1/S of the requests, and all shares are alike.
        new_tokens: Number of tokens that each request computes.
        context: Number of tokens in each request's KV cache before the step. A prefill (``new_tokens`` > 1) has none.
    """

    requests: int
    new_tokens: int
    context: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens of the step."""
        return self.requests * self.new_tokens

    @property
    def phase(self) -> str:
        """``prefill`` or ``decode``."""
        return "prefill" if self.new_tokens > 1 else "decode"


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its linear layers by projection, and the KV cache of the requests."""

    linears: dict[str, Any]
    keys: torch.Tensor
    values: torch.Tensor


class Stack:
    """Some layers of one rank.

    Args:
        deployment: The model, P and S.
        layers: Number of layers.
        batch: The batch of the step to run.
        dtype: The dtype of weights and activations.
        device: The device on which the layers run.
    """

    def __init__(
        self, deployment: Deployment, layers: int, batch: Batch, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.deployment, self.batch, self.dtype, self.device = deployment, batch, dtype, device
        layout = RankLayout(deployment.ranks, deployment.sp)
        sp_group: Any = ReplicatedGroup(layout.sp_size)
        base_tp_group: Any = ReplicatedGroup(layout.base_tp_size) if layout.base_tp_size > 1 else None
        self.topology = Topology(layout, 0, sp_group, base_tp_group, CollectiveExchange(sp_group))
        self.group = ReplicatedGroup(deployment.ranks)
        (qkv, query), head_dim = deployment.widths, deployment.layer.head_dim
        self.heads, self.kv_heads = query // head_dim, (qkv - query) // 2 // head_dim
        self._generator = torch.Generator(device).manual_seed(0)
        cache = (batch.requests, self.kv_heads, batch.context + batch.new_tokens, head_dim)
        self.layers = [
            Layer(self._linears(), self._replicated(*cache), self._replicated(*cache)) for _ in range(layers)
        ]

    def input(self, mode: Mode) -> torch.Tensor:
        """Return the input of a step: ``[T, h]`` in TP, ``[T / S, h]`` in SP."""
        rows = self._replicated(self.batch.tokens, self.deployment.layer.hidden)
        return rows if mode is Mode.TP else rows[: self.batch.tokens // self.deployment.sp].clone()

    def run(self, x: torch.Tensor, mode: Mode) -> torch.Tensor:
        """Run all layers. The result has the shape of ``x``."""
        step = Step(mode, self.topology, None, num_tokens=self.batch.tokens)
        for layer in self.layers:
            x = x + self._project(layer, "o", self._attention(layer, self._project(layer, "qkv", norm(x), step)), step)
            gate, up = self._project(layer, "gate_up", norm(x), step).chunk(2, dim=-1)
            x = x + self._project(layer, "down", F.silu(gate) * up, step)
        return x

    def _project(self, layer: Layer, name: str, x: torch.Tensor, step: Step) -> torch.Tensor:
        linear = layer.linears[name]
        if step.sharded:
            return linear.projection.forward(x, step)
        product = linear.quant_method.apply(linear, x)
        return self.group.all_reduce(product) if name in ROW_PARALLEL else product

    def _attention(self, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        """Compute attention from ``[T, (heads + 2 kv_heads) d]`` to ``[T, heads d]``.

        The keys and values of the new tokens go into the KV cache.
        """
        batch, heads, kv_heads = self.batch, self.heads, self.kv_heads
        by_head = qkv.view(batch.requests, batch.new_tokens, heads + 2 * kv_heads, -1).transpose(1, 2)
        query, key, value = by_head.split((heads, kv_heads, kv_heads), dim=1)
        layer.keys[:, :, batch.context :].copy_(key)
        layer.values[:, :, batch.context :].copy_(value)
        out = F.scaled_dot_product_attention(
            query, layer.keys, layer.values, is_causal=batch.new_tokens > 1, enable_gqa=heads != kv_heads
        )
        return out.transpose(1, 2).reshape(batch.tokens, -1)

    def _linears(self) -> dict[str, Any]:
        """Make linear layers as a model has them. TP weights are views of base weights, and all S shards are equal."""
        linears, sp = {}, self.deployment.sp
        for name, shard in self.deployment.shards.items():
            weight = self._random(shard.outputs, shard.inputs) * shard.inputs**-0.5
            base = weight.repeat(1, sp) if name in ROW_PARALLEL else weight.repeat(sp, 1)
            linear = SimpleNamespace(
                weight=base[: shard.outputs, : shard.inputs],
                bias=None,
                skip_bias_add=False,
                gather_output=False,
                input_is_parallel=True,
                quant_method=UnquantizedLinearMethod(),
            )
            linear.projection = PROJECTIONS[name](linear, BaseWeight(linear, self.topology, base, None))
            linears[name] = linear
        return linears

    def _replicated(self, first: int, *rest: int) -> torch.Tensor:
        """Return ``first`` random items. Each of the S ranks has the same items."""
        sp = self.deployment.sp
        return self._random(first // sp, *rest).repeat(sp, *(1 for _ in rest))

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self.dtype)


def norm(x: torch.Tensor) -> torch.Tensor:
    """Apply RMSNorm over the last dimension, with weights of 1."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)
