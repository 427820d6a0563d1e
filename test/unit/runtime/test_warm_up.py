"""Before the KV pool is sized, each collective of an SP step was made at a chunk's size: eagerly and as in graphs."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang_shift.config import ShiftConfig
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.topology import Topology
from sglang_shift.runtime import model_runner

HIDDEN, CHUNK = 64, 1000
QKV, OUT = 48, 32
"""Columns of one rank's full-TP shards."""


class PyNccl:
    available, disabled = True, True

    @contextmanager
    def change_state(self, enable):
        before, self.disabled = self.disabled, not enable
        yield
        self.disabled = before


class Group:
    """One of SGLang's groups, which notes what it is asked for, by which way, and how many elements it sends."""

    rank_in_group = 0
    device_group = None

    def __init__(self, name, world_size, calls, pynccl):
        self.name, self.world_size, self.calls, self.pynccl_comm = name, world_size, calls, pynccl

    def note(self, what, sent):
        assert sent.dtype == torch.bfloat16 and sent.device.type == "meta"
        eager = self.pynccl_comm is None or self.pynccl_comm.disabled
        self.calls.append((self.name, what, "eager" if eager else "graph", sent.numel()))

    def all_to_all_single(self, output, input):
        assert output.shape == input.shape and input.numel() % self.world_size == 0
        self.note("all-to-all", input)

    def all_gather_into_tensor(self, output, input):
        assert output.numel() == input.numel() * self.world_size
        self.note("all-gather", input)

    def all_reduce(self, x):
        self.note("all-reduce", x)
        return x


def load(monkeypatch, world, sp, device="meta", pynccl=PyNccl):
    """What ``load_model`` calls on a machine with accelerators, of which PyTorch's meta device takes the part."""
    calls = []
    groups = [Group(name, size, calls, pynccl and pynccl()) for name, size in (("sp", sp), ("base", world // sp))]
    sp_group, base = groups[0], groups[1] if world > sp else None
    built = Topology(RankLayout(world, sp), 0, sp_group, base, CollectiveExchange(sp_group))  # type: ignore[arg-type]
    sp_model = SimpleNamespace(
        weights=SimpleNamespace(report=lambda: SimpleNamespace(total=0, beyond_base=0), text=""),
        exchange_columns=[QKV, OUT],
        forwards=None,
        exchange_volume=lambda exchange, dtype: None,
    )
    config = ShiftConfig(world, sp, True, "tokens", exchange="collective")
    for name, value in {
        "shift_config_of": lambda args: config,
        "get_flags": lambda: SimpleNamespace(sp=SimpleNamespace(enabled=False)),
        "get_exec": lambda: SimpleNamespace(features=SimpleNamespace(enable_weights_cpu_backup=False)),
        "get_schedule": lambda: SimpleNamespace(chunked_prefill_size=CHUNK),
        "get_parallel": lambda: SimpleNamespace(nnodes=1),
        "SpModel": lambda model, groups, **options: sp_model,
        "check_class": lambda model, name: None,
        "let_rows_replace": lambda model: True,
    }.items():
        monkeypatch.setattr(model_runner, name, value)
    monkeypatch.setattr(model_runner, "build_topology", lambda layout: built)
    monkeypatch.setattr(model_runner.ModelRunner, "load_model", lambda self: None)
    mine = model_runner.ShiftModelRunner.__new__(model_runner.ShiftModelRunner)
    mine.server_args = mine.model = None
    mine.is_generation = True
    mine.model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]), hidden_size=HIDDEN
    )
    mine.device, mine.dtype, mine.weight_load_mem_usage = device, torch.bfloat16, 0.0
    mine.memory_saver_adapter = SimpleNamespace(region=lambda *args, **kwargs: nullcontext())
    mine._free_gib = lambda: 0.0  # type: ignore[method-assign]
    mine.load_model()
    return calls


@pytest.mark.parametrize(("world", "sp"), [(8, 8), (8, 4), (6, 3)])
def test_every_collective_of_a_step_at_the_size_of_a_chunk(monkeypatch, world, sp):
    rows = -(-CHUNK // sp)
    expected = {("sp", "all-to-all", way, rows * sp * HIDDEN) for way in ("eager", "graph")}  # the embedding's
    expected |= {("sp", "all-gather", way, rows * HIDDEN) for way in ("eager", "graph")}
    if world > sp:
        expected |= {("base", "all-reduce", way, rows * HIDDEN) for way in ("eager", "graph")}
    calls = load(monkeypatch, world, sp)
    assert set(calls) == expected and len(calls) == len(expected)


def test_qkv_where_it_is_wider_than_the_embedding(monkeypatch):
    monkeypatch.setitem(globals(), "QKV", HIDDEN + 16)
    assert ("sp", "all-to-all", "eager", CHUNK // 2 * 2 * (HIDDEN + 16)) in load(monkeypatch, 2, 2)


def test_groups_without_pynccl(monkeypatch):
    assert {way for _, _, way, _ in load(monkeypatch, 4, 2, pynccl=None)} == {"eager"}


def test_a_pynccl_that_found_no_nccl(monkeypatch):
    assert {way for _, _, way, _ in load(monkeypatch, 4, 2, pynccl=Missing)} == {"eager"}


class Missing(PyNccl):
    available = False


def test_a_cpu_sends_nothing(monkeypatch):
    assert load(monkeypatch, 4, 2, device="cpu") == []
