"""The choice of an exchange, and FlashInfer's against the collective one with a stand-in for its communicator."""

from __future__ import annotations

import inspect
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer.comm import ulysses
from harness import GlooGroup, run_ranks
from sglang.srt.managers.scheduler import Scheduler
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refused
from sglang_shift.flags import EXCHANGE_DTYPES, EXCHANGES
from sglang_shift.parallel.exchange.base import SequenceExchange
from sglang_shift.parallel.exchange.choose import (
    Operands,
    check_exchange,
    make_exchange,
    why_not_flashinfer,
)
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.exchange.flashinfer import WORLD_SIZES, FlashInferExchange
from sglang_shift.parallel.exchange.gloo import GlooExchange
from sglang_shift.runtime import model_runner
from sglang_shift.runtime.scheduler import ShiftScheduler
from sglang_shift_kernels.operations import ExchangeShape


class StandIn:
    """What FlashInfer's ``UlyssesCommunicator`` promises, over gloo; its checks of operands included."""

    takes = "nvlink"

    def __init__(self, group=None, *, max_elems, dtype, backend="auto", device=None):
        self.group, self.max_elems, self.dtype = group, max_elems, dtype
        assert backend == "auto"
        self.backend, self.decision = self.takes, SimpleNamespace(backend=self.takes, reason="a stand-in")
        self.closed = 0
        self.served: list[str] = []

    def scatter_heads(self, x, *, out=None, workspace=None):
        batch, tokens, heads, width = self._checked(x, "scatter_heads")
        size = torch.distributed.get_world_size(self.group)
        assert heads % size == 0
        blocks = x.view(batch, tokens, size, heads // size, width).permute(2, 0, 1, 3, 4).contiguous()
        received = self._all_to_all(blocks)
        return received.transpose(0, 1).reshape(batch, size * tokens, heads // size, width).contiguous()

    def gather_heads(self, x, *, out=None, workspace=None):
        batch, tokens, heads, width = self._checked(x, "gather_heads")
        size = torch.distributed.get_world_size(self.group)
        assert tokens % size == 0
        blocks = x.view(batch, size, tokens // size, heads, width).transpose(0, 1).contiguous()
        received = self._all_to_all(blocks)
        return received.permute(1, 2, 0, 3, 4).reshape(batch, tokens // size, size * heads, width).contiguous()

    def close(self):
        self.closed += 1

    def _checked(self, x, what):
        assert x.dim() == 4 and x.is_contiguous() and x.dtype == self.dtype and min(x.shape) > 0
        assert x.numel() <= self.max_elems
        self.served.append(what)
        return x.shape

    def _all_to_all(self, blocks):
        received = torch.empty_like(blocks)
        torch.distributed.all_to_all_single(received.view(-1), blocks.view(-1), group=self.group)
        return received


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ["__init__", "scatter_heads", "gather_heads", "close"])
def test_the_stand_in_is_called_as_flashinfers_communicator(name):
    assert parameters(getattr(StandIn, name)) == parameters(getattr(ulysses.UlyssesCommunicator, name))


def test_what_is_read_of_flashinfer_is_there():
    from flashinfer.comm.ulysses_topology import SUPPORTED_WORLD_SIZES, UlyssesBackendDecision

    assert SUPPORTED_WORLD_SIZES == WORLD_SIZES
    assert {"backend", "reason"} <= set(UlyssesBackendDecision.__dataclass_fields__)
    source = inspect.getsource(ulysses.UlyssesCommunicator.__init__)
    assert "self.backend = " in source and "self.decision: UlyssesBackendDecision" in source


def exchanges(world: int, max_tokens: int, width: int, dtype: torch.dtype) -> list[SequenceExchange]:
    """The collective exchange and FlashInfer's, in a process of a rank's own."""
    ulysses.UlyssesCommunicator = StandIn  # type: ignore[misc]
    group = GlooGroup.mine([list(range(world))])
    group.device_group = group.group
    return [CollectiveExchange(group), FlashInferExchange(group, max_tokens, width, dtype)]


def check_equal(rank: int, world: int, dtype: torch.dtype) -> None:
    block = 24
    both = exchanges(world, max_tokens=32, width=world * block, dtype=dtype)
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(world * block, 7, generator=torch.Generator().manual_seed(9)).to(dtype)
    for local in (1, 5, 32 // world):
        x = torch.randn(local, 7, generator=generator).to(dtype)
        heads = [e.scatter_heads(x, lambda rows: rows @ weight.T, world * block) for e in both]
        assert torch.equal(*heads) and heads[0].shape == (world * local, block)
        back = [e.gather_heads(heads[0], lambda rows: rows @ weight) for e in both]
        assert torch.equal(*back) and back[0].shape == (local, 7)
        tokens = world * local - 1  # the last rank's last row is padding
        back = [e.gather_heads(heads[0][:tokens], lambda rows: rows @ weight) for e in both]
        assert torch.equal(*back) and back[0].shape[0] == -(-tokens // world)
    _, flashinfer = both
    assert flashinfer._communicator.served == ["scatter_heads", "gather_heads", "gather_heads"] * 3
    assert [e.row_bytes(block, dtype.itemsize) for e in both] == [block * dtype.itemsize] * 2
    flashinfer.close()
    assert flashinfer._communicator.closed == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 4])
def test_both_give_the_same(world, dtype):
    run_ranks(world, check_equal, dtype)


def check_capacity(rank: int, world: int) -> None:
    both = exchanges(world, max_tokens=10, width=world * 2, dtype=torch.float32)
    flashinfer = both[1]
    for local, served in ((5, 2), (6, 0)):
        x = torch.randn(local, world * 2, generator=torch.Generator().manual_seed(rank))
        before = len(flashinfer._communicator.served)
        heads = [e.scatter_heads(x, lambda rows: rows, world * 2) for e in both]
        assert torch.equal(*heads)
        assert torch.equal(*[e.gather_heads(heads[0], lambda rows: rows) for e in both])
        assert len(flashinfer._communicator.served) - before == served
    blocks = torch.arange(4.0 * world).view(world, 4) + 100 * rank
    assert torch.equal(*[e.all_to_all(blocks) for e in both])


def test_a_step_above_the_capacity_goes_the_collective_way():
    run_ranks(2, check_capacity)


def config(exchange: str = "auto", dtype: str = "auto") -> ShiftConfig:
    return ShiftConfig(8, 8, True, "tokens", exchange=exchange, exchange_dtype=dtype)


def test_where_flashinfer_can_serve():
    assert why_not_flashinfer(config(), "cuda", 8, 1) is None
    assert "the device is cpu" in why_not_flashinfer(config(), "cpu", 8, 1)
    assert "--sp-size is 3" in why_not_flashinfer(config(), "cuda", 3, 1)
    assert "there are 2" in why_not_flashinfer(config(), "cuda", 8, 2)
    assert "--shift-exchange-dtype is fp8" in why_not_flashinfer(config(dtype="fp8"), "cuda", 8, 1)


class TestChoice:
    operands = Operands(tokens=64, width=48, dtype=torch.bfloat16)
    group = SimpleNamespace(
        world_size=2, rank_in_group=0, device_group=None, all_gather_object=lambda mine: [None, mine]
    )

    @pytest.fixture(autouse=True)
    def built(self, monkeypatch, caplog):
        """Stands for FlashInfer's communicators; the list has those that were built."""
        caplog.set_level(logging.INFO)
        communicators: list[StandIn] = []

        class Kept(StandIn):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                communicators.append(self)

        monkeypatch.setattr(ulysses, "UlyssesCommunicator", Kept)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        return communicators

    def make(self, exchange: str = "auto", dtype: str = "auto", device: str = "cuda", nodes: int = 1):
        return make_exchange(config(exchange, dtype), self.group, device, nodes, self.operands)

    @pytest.mark.parametrize("asked", ["auto", "flashinfer"])
    def test_flashinfer_over_nvlink(self, asked, built):
        chosen = self.make(asked)
        assert type(chosen) is FlashInferExchange and chosen._communicator is built[0] and not built[0].closed
        assert (built[0].max_elems, built[0].dtype) == (32 * 48, torch.bfloat16)
        assert chosen.text == "flashinfer, nvlink (a stand-in)"

    def test_flashinfer_over_nccl_only_where_it_is_asked_for(self, built, monkeypatch, caplog):
        monkeypatch.setattr(StandIn, "takes", "nccl")
        assert self.make("flashinfer").text == "flashinfer, nccl (a stand-in)" and not built[0].closed
        assert type(self.make()) is CollectiveExchange and built[1].closed == 1
        assert "in place of flashinfer, nccl (a stand-in)" in caplog.text

    @pytest.mark.parametrize(("device", "nodes", "why"), [("cpu", 1, "device is cpu"), ("cuda", 2, "there are 2")])
    def test_collective_where_it_cannot(self, device, nodes, why, built, caplog):
        chosen = self.make(device=device, nodes=nodes)
        kind = GlooExchange if device == "cpu" else CollectiveExchange
        assert type(chosen) is kind and chosen.text == "collective" and not built
        assert why in caplog.text
        with pytest.raises(Refused, match="--shift-exchange flashinfer is not possible"):
            self.make("flashinfer", device=device, nodes=nodes)

    def test_collective_where_it_is_asked_for(self, built):
        assert type(self.make("collective")) is CollectiveExchange and not built

    def test_fp8_is_collective(self, built, caplog):
        for asked in ("auto", "collective"):
            chosen = self.make(asked, "fp8")
            assert chosen.fp8 and chosen.text == "collective, fp8" and not built
        assert caplog.text.count("--shift-exchange-dtype is fp8") == 1, "auto says why"
        with pytest.raises(Refused, match="flashinfer is not possible: it sends activations as they are"):
            self.make("flashinfer", "fp8")

    def test_one_that_fails(self, monkeypatch, caplog):
        def fail(self, *args, **kwargs):
            raise RuntimeError("no NVML")

        monkeypatch.setattr(StandIn, "__init__", fail)
        assert type(self.make()) is CollectiveExchange
        assert "RuntimeError: no NVML" in caplog.text
        with pytest.raises(Refused, match=r"failed \(RuntimeError: no NVML\)"):
            self.make("flashinfer")

    def test_a_flag_that_cannot_be(self, monkeypatch):
        check_exchange(config(), "cpu", 2, 1)
        with pytest.raises(Refused, match="the device is cpu; give auto or collective"):
            check_exchange(config("flashinfer"), "cpu", 2, 1)
        assert EXCHANGES == ("auto", "flashinfer", "collective") and EXCHANGE_DTYPES == ("auto", "fp8")

    def test_a_gpu_without_fp8(self, monkeypatch):
        check_exchange(config(dtype="fp8"), "cuda", 2, 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        check_exchange(config(), "cuda", 2, 1)
        with pytest.raises(Refused, match="--shift-exchange-dtype fp8 is not possible: this cuda device cannot"):
            check_exchange(config(dtype="fp8"), "cuda", 2, 1)


def check_import_fails_on_one_rank(rank: int, world: int) -> None:
    """Building the communicator would wait for the rank that has none."""
    ulysses.UlyssesCommunicator = StandIn  # type: ignore[misc]
    if rank == 1:
        sys.modules["flashinfer.comm.ulysses"] = None  # type: ignore[assignment]
    group = GlooGroup.mine([list(range(world))])
    operands = Operands(tokens=64, width=48, dtype=torch.bfloat16)
    assert type(make_exchange(config(), group, "cuda", 1, operands)) is CollectiveExchange
    with pytest.raises(Refused, match=r"flashinfer failed \(ModuleNotFoundError on rank 1: "):
        make_exchange(config("flashinfer"), group, "cuda", 1, operands)


def test_an_import_that_fails_on_one_rank_fails_on_all():
    run_ranks(2, check_import_fails_on_one_rank)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpus_kernels_are_compiled_before_it_serves(monkeypatch, device, fp8):
    warmed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(model_runner, "warm_up", lambda *args: warmed.append(args))
    monkeypatch.setattr(model_runner, "make_exchange", lambda config, group, *args: CollectiveExchange(group, fp8))
    monkeypatch.setattr(model_runner, "get_schedule", lambda: SimpleNamespace(chunked_prefill_size=512))
    monkeypatch.setattr(model_runner, "get_parallel", lambda: SimpleNamespace(nnodes=1))
    mine = SimpleNamespace(
        sp_model=SimpleNamespace(exchange_columns=[48, 32]),
        model_config=SimpleNamespace(hidden_size=64),
        topology=SimpleNamespace(sp_group=None),
        device=device,
        dtype=torch.bfloat16,
    )
    model_runner.ShiftModelRunner._exchange(mine, config())  # type: ignore[arg-type]
    assert warmed == ([(ExchangeShape(8, 2, 48, 32), 64, torch.bfloat16, "cuda", fp8)] if device == "cuda" else [])


@pytest.mark.parametrize("fails", [False, True])
def test_the_exchange_closes_after_what_sglang_releases(monkeypatch, caplog, fails):
    done: list[str] = []

    def close():
        done.append("exchange")
        if fails:
            raise RuntimeError("a peer is gone")

    monkeypatch.setattr(Scheduler, "release_host_resources", lambda self: done.append("SGLang's"))
    scheduler = ShiftScheduler.__new__(ShiftScheduler)
    topology = SimpleNamespace(exchange=SimpleNamespace(close=close))
    scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(topology=topology))
    scheduler.shift_watch = SimpleNamespace(stop=lambda: done.append("watch"))
    scheduler.release_host_resources()
    assert done == ["watch", "SGLang's", "exchange"], "a rank that ends is not compared with the others"
    assert ("could not be closed" in caplog.text and "a peer is gone" in caplog.text) is fails
