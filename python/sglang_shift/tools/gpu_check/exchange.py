"""Checks and times the exchange around attention: FlashInfer's exchange, the collective one, and that by head groups.

On one GPU, FlashInfer's exchange runs with one rank and only passes its input through. If NCCL accepts two ranks on
one GPU, FlashInfer's NCCL path runs as well. Its NVLink kernel needs several GPUs.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_shift.models.heads import Heads
from sglang_shift.parallel.exchange.base import Matmul, SequenceExchange
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.exchange.flashinfer import WORLD_SIZES, FlashInferExchange
from sglang_shift.parallel.exchange.head_groups import HeadGroups
from sglang_shift.parallel.exchange.pipeline import HeadPipeline
from sglang_shift.tools.gpu_check import environment, one_gpu
from sglang_shift.tools.gpu_check.attempts import run_or_record_problem
from sglang_shift.tools.gpu_check.ranks import RankGroup
from sglang_shift.tools.gpu_check.record import Record, Row, one_line
from sglang_shift.tools.gpu_check.timing import capture_graph, collective_seconds

ROWS = (1, 5, 128, 1024)
"""Numbers of tokens of a rank."""

HEADS, WIDTH = Heads(8, 1), 128
"""The heads of a rank, and the elements of each, for Llama-70B on 8 ranks."""

QKV, OUT = WIDTH * HEADS.qkv, WIDTH * HEADS.query
"""QKV and O columns of a rank."""


def check(record: Record) -> None:
    """Check the exchanges of one rank, and of two ranks that share a GPU."""
    names = exchanges(record)
    _run(record, "1 rank", ["cuda:0"], names)
    try:
        os.environ.update(one_gpu.nccl_environment())
        _run(record, "2 ranks on one GPU", ["cuda:0", "cuda:0"], names)
    except pytest.skip.Exception as reason:
        record.note(f"2 ranks on one GPU: skipped: {reason}")


def check_several(record: Record) -> None:
    """Check the exchanges in groups of every size for which there are enough GPUs."""
    names = exchanges(record)
    for size in (world for world in WORLD_SIZES if world <= environment.gpus()):
        _run(record, f"{size} GPUs", [f"cuda:{i}" for i in range(size)], names)


def _run(record: Record, label: str, devices: list[str], names: list[str]) -> None:
    """Run each exchange in its own group, so that no exchange fails because of another."""
    for name in names:
        rows: list[Row] = run_or_record_problem(record, f"{label}, {name}", compare, devices, "nccl", name) or []
        for row in rows:
            record.row(group=label, **row)
            if wrong := [how for how in ("eager", "graph") if not row.get(f"{how}_right", True)]:
                record.problem(f"{label}, {row['exchange']}, {row['rows']} rows: wrong ({' and '.join(wrong)})")
            if row["rows"] == ROWS[-1]:
                record.note(f"{label}: {row['exchange']}: {row['eager_us']} us there and back at {row['rows']} rows")


def exchanges(record: Record) -> list[str]:
    """Return the names of the exchanges that this environment has. If one is missing, note the reason."""
    try:
        importlib.import_module("flashinfer.comm.ulysses")
    except ImportError as error:
        record.note(f"flashinfer: skipped: {one_line(error)}")
        return ["collective", "pipelined"]
    return ["collective", "pipelined", "flashinfer"]


def compare(device: torch.device, name: str, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Run one rank's part: exchange rows there and back, and compare them with what was sent.

    Args:
        device: The device of this rank.
        name: ``collective``, ``pipelined`` or ``flashinfer``.
        dtype: The dtype of the rows.
    """
    group: Any = RankGroup()
    size, rows = group.world_size, []
    exchange = (
        FlashInferExchange(group, size * ROWS[-1], size * QKV, dtype)
        if name == "flashinfer"
        else {"collective": CollectiveExchange, "pipelined": ByHeadGroups}[name](group)
    )
    for local in ROWS:
        trip = Trip(exchange, local, dtype, device)
        row: Row = {"ranks": size, "exchange": exchange.text, "rows": local, "eager_right": trip.run_and_check()}
        row["eager_us"] = round(1e6 * collective_seconds(trip.run, device), 1)
        if device.type == "cuda" and name != "pipelined":  # servers capture no graph of it
            graph, _ = capture_graph(trip.run)
            trip.fill(seed=1)
            graph.replay()
            row["graph_right"] = trip.is_correct()
            row["graph_us"] = round(1e6 * collective_seconds(graph.replay, device), 1)
        rows.append(row)
    exchange.close()
    return rows


class ByHeadGroups(CollectiveExchange):
    """The exchange group by group, without attention between its groups, as an ordinary exchange."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.groups = HeadGroups.of(HEADS, WIDTH)

    @property
    def text(self) -> str:
        return f"pipelined, {self.groups.count} groups"

    def scatter_heads(self, x: torch.Tensor, project: Matmul, width: int) -> torch.Tensor:
        self.pipeline = HeadPipeline(self.group, self.groups, in_parts=False)
        self.pipeline.scatter(x, project, width)
        first, *others = [self.pipeline.arrived(group) for group in range(self.groups.count)]
        mine = WIDTH * self.groups.query_heads(0)
        # With one KV head, the groups are neighbours in the order of heads.
        return torch.cat([first[:, :mine], *others, first[:, mine:]], 1)

    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        widths = [WIDTH * self.groups.query_heads(group) for group in range(self.groups.count)]
        for group, output in enumerate(x.split(widths, 1)):
            self.pipeline.send_back(group, output)
        return self.pipeline.gather(project)


class Trip:
    """An exchange there and back, with what should arrive. All ranks must make the same trips.

    Args:
        exchange: The exchange to run.
        local: Number of tokens of a rank.
        dtype: The dtype of the rows.
        device: The device of this rank.
    """

    def __init__(self, exchange: SequenceExchange, local: int, dtype: torch.dtype, device: torch.device) -> None:
        self.exchange, self.size, self.local = exchange, exchange.group.world_size, local
        self.input = torch.empty(local, self.size * QKV, dtype=dtype, device=device)
        self.heads = torch.empty(self.size * local, QKV, dtype=dtype, device=device)
        self.output = torch.empty(local, self.size * OUT, dtype=dtype, device=device)
        self.fill(seed=0)

    def fill(self, seed: int) -> None:
        """Replace the rows to send in place, so that a graph reads the new rows."""
        generator = torch.Generator(self.input.device).manual_seed(self.size * seed + dist.get_rank())
        self.input.copy_(torch.randn(self.input.shape, generator=generator, device=self.input.device))

    def run(self) -> None:
        """Send the rows there and back.

        The way there gives a rank its QKV columns of all tokens. The way back gives it the O columns of all ranks for
        its own tokens.
        """
        self.heads.copy_(self.exchange.scatter_heads(self.input, _identity, self.size * QKV))
        self.output.copy_(self.exchange.gather_heads(self.heads[:, :OUT].contiguous(), _identity))

    def run_and_check(self) -> bool:
        """Run, and return whether the result is right on every rank."""
        self.run()
        return self.is_correct()

    def is_correct(self) -> bool:
        """Return whether all ranks have the right rows. An all-gather of the sent rows shows what is right."""
        everything = [torch.empty_like(self.input) for _ in range(self.size)]
        dist.all_gather(everything, self.input)
        own_columns = slice(dist.get_rank() * QKV, (dist.get_rank() + 1) * QKV)
        heads = torch.cat([rows[:, own_columns] for rows in everything])
        output = self.input.view(self.local, self.size, QKV)[:, :, :OUT].reshape(self.local, -1)
        correct = torch.equal(heads, self.heads) and torch.equal(output, self.output)
        everywhere = torch.tensor([int(correct)], device=self.input.device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere.item())


def _identity(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows unchanged, in place of a projection."""
    return rows
