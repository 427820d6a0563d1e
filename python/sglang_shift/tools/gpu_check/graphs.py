"""Checks CUDA graphs of both modes, which are captured in one pool of memory and replayed in any order.

All ranks of the group are alike (:mod:`stack`), so both modes must also give the same result.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sglang_shift.modes import Mode
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.gpu_check.shapes import DEPLOYMENTS, Deployment
from sglang_shift.tools.gpu_check.stack import Batch, Stack
from sglang_shift.tools.gpu_check.timing import capture_graph, error_of

LAYERS = 4
BATCHES = (Batch(64, 1, 512), Batch(16, 1, 512), Batch(8, 1, 512), Batch(8, 64))
"""The batches to capture. The largest batch is first, as in SGLang, so that the others find room in its memory."""

TOLERANCE = 0.02
"""The largest error in bfloat16, relative to the norm. In each layer the modes sum the same in different orders."""


@dataclass
class StepGraph:
    """A graph with the tensors that it reads and writes."""

    batch: Batch
    mode: Mode
    stack: Stack
    graph: Any
    input: torch.Tensor
    output: torch.Tensor


def check(record: Record) -> None:
    """Check the graphs of both modes at each S, for a small model on 8 ranks."""
    device = torch.device("cuda")
    for sp in (2, 4, 8):
        deployment = Deployment("Llama-8B", DEPLOYMENTS[-1].layer, LAYERS, ranks=8, sp=sp)
        with torch.no_grad():
            check_modes_agree(record, deployment, torch.bfloat16, device, TOLERANCE)
            check_replays(record, capture(record, deployment, device))


def check_modes_agree(
    record: Record, deployment: Deployment, dtype: torch.dtype, device: torch.device, tolerance: float,
    batches: tuple[Batch, ...] = BATCHES, layers: int = LAYERS,
) -> None:  # fmt: skip
    """Check that a rank's rows in SP equal the first rows in TP, as they must if all ranks are alike."""
    for batch in batches:
        stack = Stack(deployment, layers, batch, dtype, device)
        x = stack.input(Mode.TP)
        rows = batch.tokens // deployment.sp
        tp, sp = stack.run(x, Mode.TP), stack.run(x[:rows].clone(), Mode.SP)
        error = error_of(sp, tp[:rows])
        record.row(deployment=deployment.name, phase=batch.phase, tokens=batch.tokens, error=error)
        if not error <= tolerance:
            record.problem(f"{deployment.name}, {batch}: the modes differ by {error:.2g} of the norm")


def capture(record: Record, deployment: Deployment, device: torch.device) -> list[StepGraph]:
    """Capture all batches in TP, then all in SP, in one pool of memory. Record the growth of the pool and the time."""
    stacks = [Stack(deployment, LAYERS, batch, torch.bfloat16, device) for batch in BATCHES]
    pool, graphs = torch.cuda.graph_pool_handle(), []
    for mode in Mode:
        free, start = _free(device), time.perf_counter()
        for stack in stacks:
            x = stack.input(mode)
            graph, output = capture_graph(partial(stack.run, x, mode), pool)
            graphs.append(StepGraph(stack.batch, mode, stack, graph, x, output))
        seconds, growth_bytes = time.perf_counter() - start, free - _free(device)
        labels = {"deployment": deployment.name, "mode": mode.value}
        record.row(**labels, graphs=len(stacks), seconds=round(seconds, 3), bytes=growth_bytes)
        text = f"{len(stacks)} graphs in {mode.value}: {seconds:.2f} s, {growth_bytes / 2**20:.0f} MiB"
        record.note(f"{deployment.name}: {text}")
    return graphs


def check_replays(record: Record, graphs: list[StepGraph]) -> None:
    """Replay each graph with new input, and compare the result with the same step run eagerly.

    The order of the replays mixes modes and sizes.
    """
    order = [graph for pair in zip(graphs[: len(graphs) // 2], reversed(graphs), strict=False) for graph in pair]
    for graph in order + order[::-1]:
        graph.input.copy_(graph.stack.input(graph.mode))
        graph.graph.replay()
        replayed = graph.output.clone()
        error = error_of(replayed, graph.stack.run(graph.input, graph.mode))
        labels = {"deployment": graph.stack.deployment.name, "mode": graph.mode.value, "tokens": graph.batch.tokens}
        record.row(**labels, replay_error=error)
        if not error <= TOLERANCE:
            record.problem(f"{labels}: a replay differs by {error:.2g} of the norm from the eager step")


def _free(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
