"""Stacked shards: in every format of weights SP computes what TP computes, from one copy of the weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import run_ranks
from quantized_kernels import install, to_fp8
from quantized_layers import EXPERT_FORMATS
from sglang_shift.errors import Refused
from sglang_shift.layers.linear import QkvProjection
from sglang_shift.modes import Mode
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.region import scatter_tokens
from sglang_shift.parallel.step import Step, run_step
from sglang_shift.tools.gpu_check.formats import FORMATS, inputs
from sglang_shift.weights.layer_tensors import ALIGNMENT, describe
from sglang_shift.weights.stacked import NO_SHARDS, StackedShards, stack_shards
from sglang_shift.weights.stacked_base import StackedBase
from stacked_checks import (
    ROWS,
    all_ranks,
    columns_of_tp,
    compare_columns,
    experts_figure,
    figures,
    linear,
    my_rows,
    topology_of,
    without_padding,
)
from torch.testing._internal.two_tensor import TwoTensor

P2, P4 = (2, 2), (4, 2)  # P and S
# The fast tier tests a format of each layout with P = 2, and two of them with P = 4.
FAST_P4 = ("fp8, blocks of 64", "gptq_marlin, desc_act")
FAST = (*FAST_P4, "unquantized", "fp8, per tensor, static", "compressed-tensors int8", "awq", "modelopt nvfp4")


def layouts(names: Iterable[str]) -> list[Any]:
    """Each format in both layouts."""
    return [
        pytest.param(name, *layout, id=f"{name}-{layout[0]}", marks=() if name in fast else pytest.mark.full)
        for name in names for layout, fast in ((P2, FAST), (P4, FAST_P4))
    ]  # fmt: skip


# How far TP is from the float product with the checkpoint, because activations are rounded to these types.
ERROR = {"int8": 0.01, "fp8": 0.04, "nvfp4": 0.12, "16 bits": 0.004}


def activations_of(name: str) -> str:
    """The type that a format rounds activations to."""
    return next((kind for kind in ERROR if kind in name), "16 bits")


def check_format(rank: int, world: int, sp: int, name: str) -> None:
    for kind, found in figures(rank, world, sp, FORMATS[name]).items():
        assert found.difference == 0.0, kind
        assert found.of_bound <= 1, kind
        assert world > 2 or found.whole == 0.0, "a sum of two numbers does not depend on their order"
        assert found.text == (FORMATS[name].columns if kind != "down" else "a GEMM for each shard")
        assert found.error < ERROR[activations_of(name)], "TP itself must compute with the weights of the checkpoint"


@pytest.mark.parametrize(("name", "world", "sp"), layouts(FORMATS))
def test_sp_computes_what_tp_computes(name, world, sp):
    run_ranks(world, check_format, sp, name)


def check_experts(rank: int, world: int, sp: int, name: str) -> None:
    figure = experts_figure(rank, world, sp, EXPERT_FORMATS[name])
    if name == "fp8, per tensor, dynamic":
        # One scale serves all rows of a call: those of the step in TP, and this rank's in SP.
        assert figure < 0.1
    else:
        assert figure == 0.0 if "fp8" in name else figure < 1e-6


@pytest.mark.parametrize(("name", "world", "sp"), layouts(EXPERT_FORMATS))
def test_experts_that_every_rank_holds_whole(name, world, sp):
    run_ranks(world, check_experts, sp, name)


def storages(*tensors: torch.Tensor) -> int:
    """The bytes of the storages of tensors. Each storage counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_of(stacked: StackedShards) -> list[torch.Tensor]:
    """All tensors of a layer and of its shards."""
    held = [value for shard in stacked.shards for value in vars(shard).values() if isinstance(value, torch.Tensor)]
    return [*stacked.layer.parameters(), *held]


def check_memory(rank: int, world: int, name: str) -> None:
    fmt = FORMATS[name]
    install(fmt.capability)
    topology = topology_of(rank, world, 2)
    for kind in ("qkv", "down"):
        layer = linear(kind, fmt, topology)
        loaded, count = storages(*describe(layer)[1]), len(describe(layer)[1])
        parameters = dict(layer.named_parameters())
        stacked = stack_shards(layer, topology)
        assert all(layer.get_parameter(key) is parameter for key, parameter in parameters.items())
        assert storages(*tensors_of(stacked)) == stacked.bytes
        assert 2 * loaded <= stacked.bytes <= 2 * (loaded + ALIGNMENT * count)


@pytest.mark.parametrize("name", ["fp8, blocks of 64", "compressed-tensors int8", "gptq_marlin, desc_act"])
def test_nothing_is_held_twice(name):
    run_ranks(2, check_memory, name)


def check_one_gemm(rank: int, world: int) -> None:
    fmt = FORMATS["compressed-tensors fp8, tensor"]
    install()
    topology = topology_of(rank, world, 2)
    for factor, text, calls in ((1, "one GEMM", 1), (1 + rank, "a GEMM for each shard", 2)):
        layer = linear("gate_up", fmt, topology)
        layer.weight_scale.data.mul_(factor)  # a scale of the tensor that other shards may not have
        stacked = stack_shards(layer, topology)
        assert stacked.text == text
        assert compare_columns(layer, stacked, inputs(ROWS, layer.input_size, fmt)) == 0.0
        apply, seen = layer.quant_method.apply, []
        layer.quant_method.apply = lambda *args, apply=apply, seen=seen: seen.append(args) or apply(*args)
        stacked.columns(inputs(3, layer.input_size, fmt))
        assert len(seen) == calls


def test_one_gemm_needs_one_scale():
    run_ranks(2, check_one_gemm)


def check_quantized_rows(rank: int, world: int) -> None:
    fmt = FORMATS["fp8, per tensor, static"]
    install(fmt.capability)
    topology = topology_of(rank, world, 2)
    layer = linear("qkv", fmt, topology)
    projection = QkvProjection(layer, StackedBase(layer, topology, "qkv"))
    for exchange in (topology.exchange, CollectiveExchange(topology.sp_group)):
        step = Step(Mode.SP, replace(topology, exchange=exchange), None, has_exit=False)
        with run_step(step):
            local = scatter_tokens(step, inputs(ROWS, layer.input_size, fmt))
            expected, _ = projection(local)
            got, _ = projection((to_fp8(local, layer.input_scale), layer.input_scale, local.dtype))
        assert got.dtype == local.dtype and len(got) == ROWS
        assert torch.equal(got, expected)


def test_rows_that_the_norm_has_quantized():
    """SGLang's norm gives the QKV linear rows in fp8, with their scale, if the scale is static."""
    run_ranks(2, check_quantized_rows)


def check_refresh(rank: int, world: int, name: str) -> None:
    fmt = FORMATS[name]
    install()
    topology = topology_of(rank, world, 2)
    layer = linear("qkv", fmt, topology)
    stacked = stack_shards(layer, topology)
    addresses = [t.data_ptr() for t in tensors_of(stacked)]
    x = inputs(ROWS, layer.input_size, fmt)
    old = stacked.columns(my_rows(x, topology))
    changed = linear("qkv", fmt, topology, seed=5)
    for key, parameter in changed.named_parameters():
        if name == "fp8, blocks of 64":
            layer.get_parameter(key).data.copy_(parameter.data)  # as SGLang loads into a layer that it need not repack
        else:
            setattr(layer, key, torch.nn.Parameter(parameter.data, requires_grad=False))  # as it does otherwise
    expected = without_padding(my_rows(columns_of_tp(layer, x, topology), topology), ROWS, topology)
    for refresh in (stacked.refresh, stacked.refresh):
        refresh()
        got = without_padding(stacked.columns(my_rows(x, topology)), ROWS, topology)
        assert torch.equal(got, expected)
        assert not torch.equal(got, without_padding(old, ROWS, topology))
        assert compare_columns(layer, stacked, x) == 0.0
        assert [t.data_ptr() for t in tensors_of(stacked)] == addresses, "CUDA graphs have these addresses"
        assert storages(*tensors_of(stacked)) == stacked.bytes


@pytest.mark.parametrize("name", ["fp8, blocks of 64", "w8a8_int8", "gptq_marlin"])
def test_shards_follow_a_weight_update(name):
    run_ranks(2, check_refresh, name)


def check_other_shape(rank: int, world: int) -> None:
    topology = topology_of(rank, world, 2)
    layer = torch.nn.Linear(4, 3)
    stacked = stack_shards(layer, topology)
    layer.weight = torch.nn.Parameter(torch.full((5, 4), float(rank)))
    stacked.refresh()
    assert [shard.weight.unique().tolist() for shard in stacked.shards] == [[0.0], [1.0]]
    assert storages(*tensors_of(stacked)) == stacked.bytes
    assert layer.weight.data_ptr() == stacked.shards[rank].weight.data_ptr()


def test_tensors_of_another_shape_get_other_memory():
    run_ranks(2, check_other_shape)


class Odd(torch.nn.Module):
    """A layer with tensors in all places and layouts that a quantization method might choose."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        values = torch.arange(24.0) + 100 * rank
        self.weight = torch.nn.Parameter(values.view(4, 6).t())
        self.weight.weight_loader = print
        self.weight.format_ue8m0 = True
        self.weight.scales = values[:2] / 7
        self.same = self.weight
        self.column = self.weight.data[2]  # lies in the memory of the weight
        self.expanded = values[3:4].expand(5)
        self.register_buffer("buffer", values.to(torch.float8_e4m3fn))
        self.register_parameter("nothing", None)
        self.empty = torch.empty(0, 3)
        self.scalar = torch.tensor(float(rank))
        self.four_bits = (torch.arange(6, dtype=torch.uint8) + rank).view(torch.float4_e2m1fn_x2)
        self.tables = [values[4:7] + 1, {"inner": (values.bfloat16(), "text", 3)}]
        self.large = torch.zeros(10_000)[500:503] + rank
        self.part = (torch.zeros(10_000) + rank)[501:504]
        self.width = 6


def contents(holder: Any) -> dict[str, torch.Tensor]:
    inner = holder.tables[1]["inner"]
    assert inner[1:] == ("text", 3)
    names = ("weight", "same", "column", "expanded", "buffer", "empty", "scalar", "four_bits", "large", "part")
    found = {name: getattr(holder, name) for name in names}
    return {**found, "scales": holder.weight.scales, "first": holder.tables[0], "inner": inner[0]}


def as_bytes(tensor: torch.Tensor) -> list[int]:
    tensor = tensor.detach()
    return [] if not tensor.numel() else tensor.contiguous().view(-1).view(torch.uint8).tolist()


def check_odd_layer(rank: int, world: int) -> None:
    topology = topology_of(rank, world, 2)
    layer, expected = Odd(rank), [contents(Odd(other)) for other in range(world)]
    before = contents(layer)
    stacked = stack_shards(layer, topology, "odd")
    for shard, wanted in zip(stacked.shards, expected, strict=True):
        for name, tensor in contents(shard).items():
            assert as_bytes(tensor) == as_bytes(wanted[name]), name
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (
                wanted[name].shape, wanted[name].stride(), wanted[name].dtype,
            ), name  # fmt: skip
        assert shard.width == 6 and shard.nothing is None and shard.weight.format_ue8m0
        assert shard.column.data_ptr() == shard.weight[2].data_ptr(), "they share memory in every shard"
        assert shard.same.data_ptr() == shard.weight.data_ptr()
    assert layer.weight.weight_loader is print and layer.same is layer.weight
    for name, tensor in contents(layer).items():
        assert tensor is before[name], "objects stay, because SGLang and its loaders keep references"
        assert tensor.data_ptr() == contents(stacked.shards[rank])[name].data_ptr()
    assert stacked.bytes < 2000, "only the used part of a large storage is gathered"
    if rank == 1:
        layer.weight.data[0, 0] = -1.0
    stacked.refresh()
    assert stacked.shards[1].weight[0, 0] == -1.0
    assert stacked.shards[0].weight[0, 0] == 0.0


def test_every_place_and_layout_of_tensors():
    run_ranks(2, check_odd_layer)


def check_each_shard(rank: int, world: int) -> None:
    topology = topology_of(rank, world, 2)
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.weight.data.fill_(float(rank))
    stacked = stack_shards(layer, topology)
    address = layer.weight.data_ptr()
    seen = []
    for value in stacked.each_shard(lambda: layer.weight.unique().item()):
        seen.append(value)
        assert layer.weight.data_ptr() == address, "the layer is whole while a result is used"
    assert seen == [0.0, 1.0]

    def failing() -> None:
        if layer.weight.data_ptr() != address:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(stacked.each_shard(failing))
    assert layer.weight.data_ptr() == address


def test_a_layer_has_its_own_shard_after_each_other_one():
    run_ranks(2, check_each_shard)


def different_number(layer: Any, rank: int) -> None:
    layer.weights_padding_cols = rank


def different_shape(layer: Any, rank: int) -> None:
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4 + rank))


def different_attribute(layer: Any, rank: int) -> None:
    layer.weight.power_of_two = rank == 0


def one_rank_has_more(layer: Any, rank: int) -> None:
    if rank == 1:
        layer.cache = torch.zeros(3)


def experts_of_a_rank(layer: Any, rank: int) -> None:
    layer.moe_ep_rank = rank


def subclass(layer: Any, rank: int) -> None:
    layer.weight = torch.nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))


def state_at_the_weight(layer: Any, rank: int) -> None:
    if rank == 1:  # the other ranks must raise the same
        layer.weight.quant_state = {0: SimpleNamespace(absmax=torch.ones(3))}


def weights_of_the_method(layer: Any, rank: int) -> None:
    layer.quant_method = SimpleNamespace(w13=SimpleNamespace(storage=SimpleNamespace(data=torch.ones(3))))


def on_another_device(layer: Any, rank: int) -> None:
    layer.cache = torch.zeros(3, device="meta")


def not_loaded(layer: Any, rank: int) -> None:
    layer.weight = torch.nn.UninitializedParameter()


def method(name: str) -> Any:
    return lambda layer, rank: setattr(layer, "quant_method", type(name, (), {})())


REFUSALS = [
    (different_number, "L cannot be shared by TP and SP: weights_padding_cols is 0 and 1 on the ranks"),
    (different_shape, r"weight is float32 \[4, 4\] with strides \[4, 1\] and float32 \[4, 5\] with strides \[5, 1\]"),
    (different_attribute, "weight.power_of_two is True and False on the ranks"),
    (one_rank_has_more, r"cache is missing and float32 \[3\] with strides \[1\] on the ranks"),
    (experts_of_a_rank, "moe_ep_rank is 0 and 1 on the ranks"),
    (subclass, "L cannot be shared by TP and SP: it hides tensors in weight, a TwoTensor; serve this model without"),
    (state_at_the_weight, r"it hides tensors in weight.quant_state\[0\], a SimpleNamespace"),
    (weights_of_the_method, "it hides tensors in quant_method.w13, a SimpleNamespace"),
    (on_another_device, "it has tensors on several devices"),
    (not_loaded, "it gets the shape of weight from a file"),
    (method("BitsAndBytesLinearMethod"), "it is quantized by BitsAndBytesLinearMethod, which keeps the state"),
    (method("GGUFLinearMethod"), "it is quantized by GGUFLinearMethod, which pads each rank's weights"),
]


def check_refusals(rank: int, world: int) -> None:
    topology = topology_of(rank, world, 2)
    for change, message in REFUSALS:
        layer = torch.nn.Linear(4, 4)
        layer.weights_padding_cols = 0
        change(layer, rank)
        with pytest.raises(Refused, match=message):
            stack_shards(layer, topology, "L")


def test_refusals():
    """All ranks raise the same sentence, whichever rank has the problem."""
    run_ranks(2, check_refusals)


def test_refused_methods_are_sglangs():
    for name in NO_SHARDS:
        module = importlib.import_module(f"sglang.srt.layers.quantization.{name.lower()}")
        assert any(each.startswith(name) and each.endswith("LinearMethod") for each in vars(module)), name


def check_rank_numbers(rank: int, world: int) -> None:
    topology = topology_of(rank, world, 2)
    layer = torch.nn.Linear(4, 4)
    layer.tp_rank = rank
    assert stack_shards(layer, topology).shards[1 - rank].tp_rank == rank
    assert len(all_ranks(torch.ones(1))) == world


def test_the_number_of_a_rank_may_differ():
    run_ranks(2, check_rank_numbers)
