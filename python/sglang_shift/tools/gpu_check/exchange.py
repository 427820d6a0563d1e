"""The exchange around attention: FlashInfer's and the collective one give what they should, and how fast.

On one GPU FlashInfer's has one rank, which is a passage straight through, and where NCCL lets two ranks have
one GPU, its NCCL path. Its NVLink kernel needs several GPUs.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_shift.parallel.exchange.base import SequenceExchange
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.exchange.flashinfer import WORLD_SIZES, FlashInferExchange
from sglang_shift.tools.gpu_check import environment, one_gpu
from sglang_shift.tools.gpu_check.attempts import attempt
from sglang_shift.tools.gpu_check.ranks import RankGroup
from sglang_shift.tools.gpu_check.record import Record, Row, one_line
from sglang_shift.tools.gpu_check.timing import capture_graph, collective_seconds

ROWS = (1, 5, 128, 1024)
"""Tokens of a rank."""

QKV, OUT = 1280, 1024
"""Columns of a rank of Llama-70B on 8."""


def check(record: Record) -> None:
    """One rank, and two that share a GPU."""
    names = exchanges(record)
    _run(record, "1 rank", ["cuda:0"], names)
    try:
        os.environ.update(one_gpu.nccl_environment())
        _run(record, "2 ranks on one GPU", ["cuda:0", "cuda:0"], names)
    except pytest.skip.Exception as reason:
        record.note(f"2 ranks on one GPU: skipped: {reason}")


def check_several(record: Record) -> None:
    """Every size of group that there are GPUs for."""
    names = exchanges(record)
    for size in (world for world in WORLD_SIZES if world <= environment.gpus()):
        _run(record, f"{size} GPUs", [f"cuda:{i}" for i in range(size)], names)


def _run(record: Record, label: str, devices: list[str], names: list[str]) -> None:
    """Each exchange in a group of its own, so that none fails because of another."""
    for name in names:
        rows: list[Row] = attempt(record, f"{label}, {name}", compare, devices, "nccl", name) or []
        for row in rows:
            record.row(group=label, **row)
            if wrong := [how for how in ("eager", "graph") if not row.get(f"{how}_right", True)]:
                record.problem(f"{label}, {row['exchange']}, {row['rows']} rows: wrong ({' and '.join(wrong)})")
            if row["rows"] == ROWS[-1]:
                record.note(f"{label}: {row['exchange']}: {row['eager_us']} us there and back at {row['rows']} rows")


def exchanges(record: Record) -> list[str]:
    """The names of those that this environment has; why it lacks one is noted."""
    try:
        importlib.import_module("flashinfer.comm.ulysses")
    except ImportError as error:
        record.note(f"flashinfer: skipped: {one_line(error)}")
        return ["collective"]
    return ["collective", "flashinfer"]


def compare(device: torch.device, name: str, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """One rank's part: an exchange there and back, against what was sent.

    Args:
        device: This rank's.
        name: ``collective`` or ``flashinfer``.
        dtype: Of what is sent.
    """
    group: Any = RankGroup()
    size, rows = group.world_size, []
    exchange = (
        CollectiveExchange(group)
        if name == "collective"
        else FlashInferExchange(group, size * ROWS[-1], size * QKV, dtype)
    )
    for local in ROWS:
        trip = Trip(exchange, local, dtype, device)
        row: Row = {"ranks": size, "exchange": exchange.text, "rows": local, "eager_right": trip.right()}
        row["eager_us"] = round(1e6 * collective_seconds(trip.run, device), 1)
        if device.type == "cuda":
            graph, _ = capture_graph(trip.run)
            trip.fill(seed=1)
            graph.replay()
            row["graph_right"] = trip.arrived()
            row["graph_us"] = round(1e6 * collective_seconds(graph.replay, device), 1)
        rows.append(row)
    exchange.close()
    return rows


class Trip:
    """An exchange there and back with what should arrive. All ranks make the same ones.

    Args:
        exchange: Whose.
        local: Tokens of a rank.
        dtype: Of the operands.
        device: This rank's.
    """

    def __init__(self, exchange: SequenceExchange, local: int, dtype: torch.dtype, device: torch.device) -> None:
        self.exchange, self.size, self.local = exchange, exchange.group.world_size, local
        self.sent = torch.empty(local, self.size * QKV, dtype=dtype, device=device)
        self.heads = torch.empty(self.size * local, QKV, dtype=dtype, device=device)
        self.back = torch.empty(local, self.size * OUT, dtype=dtype, device=device)
        self.fill(seed=0)

    def fill(self, seed: int) -> None:
        """Other rows to send, in place, so that a graph finds them."""
        generator = torch.Generator(self.sent.device).manual_seed(self.size * seed + dist.get_rank())
        self.sent.copy_(torch.randn(self.sent.shape, generator=generator, device=self.sent.device))

    def run(self) -> None:
        """There: QKV's columns of this rank for all tokens. Back: O's columns of all ranks for its own tokens."""
        self.heads.copy_(self.exchange.scatter_heads(self.sent, _as_it_is, self.size * QKV))
        self.back.copy_(self.exchange.gather_heads(self.heads[:, :OUT].contiguous(), _as_it_is))

    def right(self) -> bool:
        """Run, and compare on every rank."""
        self.run()
        return self.arrived()

    def arrived(self) -> bool:
        """Whether all ranks have what they should, by an all-gather of what was sent."""
        everything = [torch.empty_like(self.sent) for _ in range(self.size)]
        dist.all_gather(everything, self.sent)
        mine = slice(dist.get_rank() * QKV, (dist.get_rank() + 1) * QKV)
        heads = torch.cat([rows[:, mine] for rows in everything])
        back = self.sent.view(self.local, self.size, QKV)[:, :, :OUT].reshape(self.local, -1)
        right = torch.equal(heads, self.heads) and torch.equal(back, self.back)
        everywhere = torch.tensor([int(right)], device=self.sent.device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere.item())


def _as_it_is(rows: torch.Tensor) -> torch.Tensor:
    """In place of a projection."""
    return rows
