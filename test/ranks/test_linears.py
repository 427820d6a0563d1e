"""The linears outside of attention, and those inside of it that compute heads, against the whole model's, over gloo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks, topology_over_gloo
from sglang_shift.errors import ShiftError
from sglang_shift.layers.linear import ColumnProjection, HeadsProjection, OutputProjection, RowProjection
from sglang_shift.modes import Mode
from sglang_shift.parallel.region import scatter_tokens
from sglang_shift.parallel.step import Step, run_step
from sglang_shift.weights.base_weights import BaseWeight

HIDDEN, WIDTH = 16, 6
"""Columns of a row, and of the shard of one TP rank."""
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SIZES = [(2, 2), (4, 4), (4, 2)]


def linear(**fields):
    """What the projections read of SGLang's linear."""
    defaults = {"skip_bias_add": False, "gather_output": False, "input_is_parallel": True, "bias": None}
    apply = lambda layer, x, bias: F.linear(x, layer.weight, bias)  # noqa: E731
    return SimpleNamespace(quant_method=SimpleNamespace(apply=apply), **{**defaults, **fields})


class Whole:
    """The weights of the whole model, with the shards of all TP ranks, and the base weights of this rank."""

    def __init__(self, topology, columns=WIDTH):
        world = topology.layout.world_size
        self.topology = topology
        self.members = topology.layout.sp_groups()[topology.layout.base_tp_index(topology.rank)]
        generator = torch.Generator().manual_seed(0)
        self.column = torch.randn(world, columns, HIDDEN, generator=generator)
        self.column_bias = torch.randn(world, columns, generator=generator)
        self.row = torch.randn(world, HIDDEN, WIDTH, generator=generator)
        self.row_bias = torch.randn(HIDDEN, generator=generator)
        self.x = torch.randn(13, HIDDEN, generator=generator)

    def column_projection(self, bias=True, **fields):
        weight, biases = self.column[self.members].flatten(0, 1), self.column_bias[self.members].flatten()
        layer = linear(bias=self.column_bias[self.topology.rank] if bias else None, **fields)
        return ColumnProjection(layer, BaseWeight(layer, self.topology, weight, biases if bias else None))

    def row_projection(self, kind=RowProjection, **fields):
        layer = linear(bias=self.row_bias, **fields)
        weight = torch.cat(list(self.row[self.members]), 1)
        return kind(layer, BaseWeight(layer, self.topology, weight, self.row_bias))

    def columns_of(self, x):
        """``[n, P * WIDTH]``, in the order of TP ranks."""
        return F.linear(x, self.column.flatten(0, 1), self.column_bias.flatten())

    def rows_of(self, x, bias=True):
        return F.linear(x, torch.cat(list(self.row), 1), self.row_bias if bias else None)


def steps(topology, whole):
    """Steps of several numbers of tokens: the step, this rank's rows, and those of them that are no padding."""
    for tokens in (1, 2, 5, 8, 13):
        step = Step(Mode.SP, topology, None, has_exit=False)
        with run_step(step):
            local = scatter_tokens(step, whole.x[:tokens])
            start = topology.sp_index * len(local)
            yield local, max(0, min(tokens - start, len(local)))


def check_whole_columns(rank: int, world: int, sp: int) -> None:
    topology = topology_over_gloo(rank, world, sp)
    whole = Whole(topology)
    columns, rows = whole.column_projection(gather_output=True), whole.row_projection(input_is_parallel=False)
    for local, real in steps(topology, whole):
        product, bias = columns(local)
        assert bias is None and product.shape == (len(local), world * WIDTH)
        expected = whole.columns_of(local)
        assert torch.allclose(product, expected, **CLOSE), "columns are in the order of TP ranks"
        # An operation may mix all columns of a row.
        product = product.softmax(-1)
        result, bias = rows(product)
        assert bias is None and result.shape == local.shape
        assert torch.allclose(result[:real], whole.rows_of(expected.softmax(-1))[:real], **CLOSE)


@pytest.mark.parametrize(("world", "sp"), SIZES)
def test_linears_that_gather_columns_and_divide_them(world, sp):
    run_ranks(world, check_whole_columns, sp)


def check_pair(rank: int, world: int, sp: int, gated: bool) -> None:
    topology = topology_over_gloo(rank, world, sp)
    whole = Whole(topology, 2 * WIDTH if gated else WIDTH)

    def activation(x):
        if not gated:
            return F.gelu(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    columns, rows = whole.column_projection(), whole.row_projection()
    for local, real in steps(topology, whole):
        product, _ = columns(local)
        assert product.shape == (len(local) * sp, whole.column.shape[1]), "one row for each shard, as in TP"
        activated = activation(whole.columns_of(local).view(len(local), world, -1)).flatten(1)
        expected = whole.rows_of(activated)[:real]
        result, bias = rows(activation(product))
        assert bias is None and torch.allclose(result[:real], expected, **CLOSE)
        # The sum is complete, also if the model would sum itself.
        for arguments in ((True,), (False,)):
            assert torch.equal(rows(activation(product), *arguments)[0], result)
        assert torch.equal(rows(activation(product), skip_all_reduce=True, forward_batch=None)[0], result)


@pytest.mark.parametrize("gated", [False, True], ids=["one output", "gate and up"])
@pytest.mark.parametrize(("world", "sp"), SIZES)
def test_a_pair_of_linears_around_an_activation(world, sp, gated):
    run_ranks(world, check_pair, sp, gated)


def check_biases(rank: int, world: int, sp: int) -> None:
    topology = topology_over_gloo(rank, world, sp)
    whole = Whole(topology)
    rows = whole.row_projection(skip_bias_add=True)
    columns = whole.column_projection(bias=False, skip_bias_add=True)
    for local, real in steps(topology, whole):
        product, bias = columns(local)
        assert bias is None
        result, bias = rows(product)
        assert bias is whole.row_bias, "the model adds it"
        expected = whole.rows_of(F.linear(local, whole.column.flatten(0, 1)), bias=False)
        assert torch.allclose(result[:real], expected[:real], **CLOSE)


@pytest.mark.parametrize(("world", "sp"), SIZES)
def test_a_row_parallel_bias_that_the_model_adds(world, sp):
    run_ranks(world, check_biases, sp)


def check_heads(rank: int, world: int, sp: int) -> None:
    """Between the exchanges of a layer, a rank has all tokens, and its own heads as in TP."""
    topology = topology_over_gloo(rank, world, sp)
    whole = Whole(topology)
    layer = linear(bias=whole.column_bias[rank], weight=whole.column[rank])
    output = whole.row_projection(OutputProjection, skip_bias_add=True)
    step = Step(Mode.SP, topology, None, has_exit=False)
    with run_step(step):
        local = scatter_tokens(step, whole.x)
        step.in_attention = True
        heads, bias = HeadsProjection(layer)(whole.x)
        assert bias is None
        assert torch.allclose(heads, whole.columns_of(whole.x).view(-1, world, WIDTH)[:, rank], **CLOSE)
        result, bias = output(heads)
        assert bias is whole.row_bias and not step.in_attention
        expected = whole.rows_of(whole.columns_of(whole.x), bias=False)[topology.sp_index * len(local) :]
        real = min(len(local), len(expected))
        assert torch.allclose(result[:real], expected[:real], **CLOSE)
    layer.skip_bias_add = True
    product, bias = HeadsProjection(layer)(whole.x)
    assert bias is layer.bias and torch.allclose(product + bias, heads, **CLOSE)


@pytest.mark.parametrize(("world", "sp"), SIZES)
def test_heads_that_are_computed_from_latents(world, sp):
    run_ranks(world, check_heads, sp)


def test_a_buffer_of_the_caller_is_refused():
    layer = linear()
    projection = RowProjection(layer, BaseWeight(layer, None, torch.ones(2, 2), None))  # type: ignore[arg-type]
    with pytest.raises(ShiftError, match="cannot write the result of a row-parallel linear into a buffer"):
        projection(torch.ones(1, 2), output_tensor=torch.empty(1, 2))
