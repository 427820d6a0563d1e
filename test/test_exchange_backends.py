"""The choice of an exchange, and FlashInfer's against the collective one with a stand-in for its communicator."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import GlooGroup, run_ranks
from sglang.srt.managers.scheduler import Scheduler
from sglang_shift import exchange_backends, flashinfer_exchange
from sglang_shift.errors import Refused
from sglang_shift.exchange import SequenceExchange
from sglang_shift.exchange_backends import Operands, check_exchange, make_exchange, why_not_flashinfer
from sglang_shift.flashinfer_exchange import WORLD_SIZES, FlashInferExchange
from sglang_shift.region import region
from sglang_shift.scheduler import ShiftScheduler


class StandIn:
    """What FlashInfer's ``UlyssesCommunicator`` promises, over gloo; its checks of operands included."""

    def __init__(self, group=None, *, max_elems, dtype, backend="auto", device=None):
        self.group, self.max_elems, self.dtype = group, max_elems, dtype
        self.backend, self.decision = "nccl", SimpleNamespace(backend="nccl", reason="a stand-in")
        self.closed = 0
        self.served: list[str] = []

    def create_workspace(self, *, max_elems=None):
        return ("workspace", self.max_elems)

    def scatter_heads(self, x, *, out=None, workspace=None):
        batch, tokens, heads, width = self._checked(x, workspace, "scatter_heads")
        size = torch.distributed.get_world_size(self.group)
        assert heads % size == 0
        blocks = x.view(batch, tokens, size, heads // size, width).permute(2, 0, 1, 3, 4).contiguous()
        received = self._all_to_all(blocks)
        return received.transpose(0, 1).reshape(batch, size * tokens, heads // size, width).contiguous()

    def gather_heads(self, x, *, out=None, workspace=None):
        batch, tokens, heads, width = self._checked(x, workspace, "gather_heads")
        size = torch.distributed.get_world_size(self.group)
        assert tokens % size == 0
        blocks = x.view(batch, size, tokens // size, heads, width).transpose(0, 1).contiguous()
        received = self._all_to_all(blocks)
        return received.permute(1, 2, 0, 3, 4).reshape(batch, tokens // size, size * heads, width).contiguous()

    def close(self):
        self.closed += 1

    def _checked(self, x, workspace, what):
        assert x.dim() == 4 and x.is_contiguous() and x.dtype == self.dtype and min(x.shape) > 0
        assert x.numel() <= self.max_elems and workspace == ("workspace", self.max_elems)
        self.served.append(what)
        return x.shape

    def _all_to_all(self, blocks):
        received = torch.empty_like(blocks)
        torch.distributed.all_to_all_single(received.view(-1), blocks.view(-1), group=self.group)
        return received


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ["__init__", "create_workspace", "scatter_heads", "gather_heads", "close"])
def test_the_stand_in_is_called_as_flashinfers_communicator(name):
    from flashinfer.comm.ulysses import UlyssesCommunicator

    assert parameters(getattr(StandIn, name)) == parameters(getattr(UlyssesCommunicator, name))


def test_what_is_read_of_flashinfer_is_there():
    from flashinfer.comm.ulysses import UlyssesCommunicator
    from flashinfer.comm.ulysses_topology import SUPPORTED_WORLD_SIZES, UlyssesBackendDecision

    assert SUPPORTED_WORLD_SIZES == WORLD_SIZES
    assert {"backend", "reason"} <= set(UlyssesBackendDecision.__dataclass_fields__)
    source = inspect.getsource(UlyssesCommunicator.__init__)
    assert "self.backend = " in source and "self.decision: UlyssesBackendDecision" in source


def exchanges(world: int, max_tokens: int, width: int, dtype: torch.dtype) -> list[SequenceExchange]:
    """The collective exchange and FlashInfer's."""
    flashinfer_exchange.new_communicator = lambda group, n, dtype: StandIn(group, max_elems=n, dtype=dtype)  # type: ignore[assignment]
    group = GlooGroup.mine([list(range(world))])
    group.device_group = group.group
    return [SequenceExchange(group), FlashInferExchange(group, max_tokens, width, dtype)]


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
    collective, flashinfer = both
    assert flashinfer._communicator.served == ["scatter_heads", "gather_heads"] * 3
    assert (collective.bytes_sent, collective.calls) == (flashinfer.bytes_sent, flashinfer.calls)
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


def test_where_flashinfer_can_serve():
    assert why_not_flashinfer("cuda", 8, 1) is None
    assert "the device is cpu" in why_not_flashinfer("cpu", 8, 1)
    assert "--sp-size is 3" in why_not_flashinfer("cuda", 3, 1)
    assert "there are 2" in why_not_flashinfer("cuda", 8, 2)


class TestChoice:
    operands = Operands(tokens=64, width=48, dtype=torch.bfloat16)
    group = SimpleNamespace(world_size=2, rank_in_group=0, device_group=None)

    @pytest.fixture
    def built(self, monkeypatch):
        """Stands for FlashInfer's communicator; the list has what it was built for."""
        calls: list[Any] = []

        def new(group, max_elems, dtype):
            calls.append((max_elems, dtype))
            return StandIn(group, max_elems=max_elems, dtype=dtype)

        monkeypatch.setattr(flashinfer_exchange, "new_communicator", new)
        return calls

    @pytest.fixture
    def broken(self, monkeypatch):
        def fail(*args):
            raise RuntimeError("no NVML")

        monkeypatch.setattr(flashinfer_exchange, "new_communicator", fail)

    @pytest.mark.parametrize("asked", ["auto", "flashinfer"])
    def test_flashinfer_where_it_can(self, asked, built):
        chosen = make_exchange(asked, self.group, "cuda", 1, self.operands)
        assert type(chosen) is FlashInferExchange and built == [(32 * 48, torch.bfloat16)]
        assert chosen.text == "flashinfer, nccl (a stand-in)"

    @pytest.mark.parametrize(("device", "nodes"), [("cpu", 1), ("cuda", 2)])
    def test_collective_where_it_cannot(self, device, nodes, built):
        chosen = make_exchange("auto", self.group, device, nodes, self.operands)
        assert type(chosen) is SequenceExchange and chosen.text == "collective" and not built
        with pytest.raises(Refused, match="--shift-exchange flashinfer is not possible"):
            make_exchange("flashinfer", self.group, device, nodes, self.operands)

    def test_collective_where_it_is_asked_for(self, built):
        assert type(make_exchange("collective", self.group, "cuda", 1, self.operands)) is SequenceExchange
        assert not built

    def test_one_that_fails(self, broken, caplog):
        assert type(make_exchange("auto", self.group, "cuda", 1, self.operands)) is SequenceExchange
        assert "RuntimeError: no NVML" in caplog.text
        with pytest.raises(Refused, match=r"failed \(RuntimeError: no NVML\)"):
            make_exchange("flashinfer", self.group, "cuda", 1, self.operands)

    def test_a_flag_that_cannot_be(self):
        check_exchange("auto", "cpu", 2, 1)
        with pytest.raises(Refused, match="the device is cpu; give auto or collective"):
            check_exchange("flashinfer", "cpu", 2, 1)
        assert exchange_backends.BACKENDS == ("auto", "flashinfer", "collective")


@pytest.mark.parametrize("fails", [False, True])
def test_the_exchange_closes_after_what_sglang_releases(monkeypatch, caplog, fails):
    done: list[str] = []

    def close():
        done.append("exchange")
        if fails:
            raise RuntimeError("a peer is gone")

    monkeypatch.setattr(region, "parallel", SimpleNamespace(exchange=SimpleNamespace(close=close)))
    monkeypatch.setattr(Scheduler, "release_host_resources", lambda self: done.append("SGLang's"))
    ShiftScheduler.__new__(ShiftScheduler).release_host_resources()
    assert done == ["SGLang's", "exchange"]
    assert ("could not be closed" in caplog.text and "a peer is gone" in caplog.text) is fails
