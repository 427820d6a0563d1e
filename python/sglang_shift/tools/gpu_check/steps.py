"""Times a rank's step in both modes, eager and as a CUDA graph, without the links between ranks.

Some layers of one rank are timed, in a group whose ranks are all alike (:mod:`stack`). The result is the time of a
layer, with the bytes that a rank sends. The time of the links must be computed from these bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from sglang_shift.modes import Mode
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.gpu_check.shapes import DEPLOYMENTS, Deployment
from sglang_shift.tools.gpu_check.stack import Batch, Stack
from sglang_shift.tools.gpu_check.timing import capture_graph, seconds_of
from sglang_shift.tools.tables import text_table

LAYERS = 4
"""Number of layers. It is large enough that no layer finds its weights in the L2 cache."""

DECODES, CONTEXT = (8, 64, 256), 1024
PREFILLS = (1024, 8192)
"""Numbers of tokens in S prompts. So each rank's tokens are whole prompts."""


def check(record: Record) -> None:
    """Time every deployment that fits into its GPUs in bfloat16."""
    device = torch.device("cuda")
    for deployment in DEPLOYMENTS[1:]:  # Llama-70B in bfloat16 at S=8 would be 140 GB on each rank
        with torch.no_grad():
            rows = [row for batch in batches(deployment.sp) for row in measure(record, deployment, batch, device)]
        record.note(table(deployment.name, rows))


def batches(sp: int) -> Iterator[Batch]:
    """Yield decodes and prefills that S ranks can share."""
    yield from (Batch(requests, 1, CONTEXT) for requests in DECODES)
    yield from (Batch(sp, tokens // sp) for tokens in PREFILLS)


def measure(
    record: Record, deployment: Deployment, batch: Batch, device: torch.device, dtype: torch.dtype = torch.bfloat16,
    layers: int = LAYERS,
) -> list[dict[str, object]]:  # fmt: skip
    """Time one step in both modes. On a GPU, time it as a CUDA graph as well."""
    stack = Stack(deployment, layers, batch, dtype, device)
    sent = deployment.sent_bytes(batch.tokens, dtype.itemsize)
    rows = []
    for mode in Mode:
        step = partial(stack.run, stack.input(mode), mode)
        seconds = {"eager": seconds_of(step, device)}
        if device.type == "cuda":
            graph, _ = capture_graph(step)
            seconds["graph"] = seconds_of(graph.replay, device)
        times = {}
        for how, elapsed in seconds.items():
            times[f"{how}_us_per_layer"] = round(1e6 * elapsed / layers, 2)
            times[f"{how}_ms_all_layers"] = round(1e3 * elapsed / layers * deployment.layers, 3)
        rows.append(
            record.row(
                deployment=deployment.name,
                phase=batch.phase,
                tokens=batch.tokens,
                requests=batch.requests,
                context=batch.context,
                mode=mode.value,
                bytes_sent_per_layer=round(sent[mode.value]),
                **times,
            )
        )
    return rows


def table(name: str, rows: list[dict[str, object]]) -> str:
    """Return a table of microseconds per layer by step, mode and execution."""
    columns = ("phase", "tokens", "mode", "eager_us_per_layer", "graph_us_per_layer", "bytes_sent_per_layer")
    heading = (f"{name}:", "tokens", "mode", "eager us/layer", "graph us/layer", "bytes sent/layer")
    return text_table([heading, *([row.get(column, "") for column in columns] for row in rows)])
