"""Reserve memory for a second set of CUDA graphs, as SGLang does for the first set."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.memory_hook import reserve_for_graph_mb
from sglang.srt.arg_groups.overrides import post_capture_kv_sizing_planned, resolving_view
from sglang.srt.utils import get_device_memory_capacity

from sglang_shift.args.chunk_size import Adjustment
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.graphs.plan import modes_of
from sglang_shift.seams import relies_on

STEPS_WITHOUT_MEMORY = Refusal(
    "--shift-graph-buckets {N} leaves steps without a graph, for which SGLANG_ENABLE_POST_CAPTURE_KV_SIZING reserves "
    "no memory; leave one of them out",
    "With that variable, the KV cache takes all memory that is left after the graphs are captured.",
)


@relies_on(
    "sglang.srt.arg_groups.memory_hook:reserve_for_graph_mb", "SGLang reserves this much memory for one set of graphs."
)
def adjust_graph_memory(server_args: Any, config: ShiftConfig) -> Adjustment:
    """Lower ``mem_fraction_static`` by the memory that SGLang reserves for its graphs, if both modes have graphs.

    A fraction that the user gave stays. With post-capture sizing nothing changes either, because SGLang sizes the KV
    pool after the captures.

    Args:
        server_args: The server arguments, after SGLang has resolved its defaults.
        config: The policy, and the largest number of graphs in SP.

    Raises:
        Refused: the KV pool would take the memory of steps that run without a graph.
    """
    settings = resolving_view(server_args)
    post_capture = post_capture_kv_sizing_planned(server_args)
    if post_capture and config.graph_buckets is not None:
        raise STEPS_WITHOUT_MEMORY(N=config.graph_buckets)
    both = len(modes_of(1, config)) > 1 and config.graph_buckets != 0
    if not both or post_capture or settings.device != "cuda" or server_args.mem_fraction_static is not None:
        return Adjustment("--mem-fraction-static stays")
    reserve, capacity = reserve_for_graph_mb(server_args), get_device_memory_capacity(settings.device)
    if not reserve or not capacity:
        return Adjustment("--mem-fraction-static stays: no graphs, or the memory of this device is not known")
    fraction = round(settings.mem_fraction_static - reserve / capacity, 3)
    return Adjustment(
        f"--mem-fraction-static {fraction} instead of {settings.mem_fraction_static}: {reserve:.0f} MiB for CUDA "
        "graphs of a second mode",
        {"mem_fraction_static": fraction},
    )
