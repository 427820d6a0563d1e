"""Attention of one layer on a CPU: SGLang's torch_native backend beside this package's.

    python benchmark/attention_cpu.py

The two take turns. A time is the median CPU time of the process, so other processes of the machine matter little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import count
from statistics import median
from time import process_time
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.platforms.attention_backend import CpuAttentionBackend

LAYERS = 16


class Case(NamedTuple):
    """Steps that run one after the other: for each, the cached and the new tokens of every request."""

    name: str
    steps: list[list[tuple[int, int]]]


def prompt(tokens: int, chunk: int) -> list[list[tuple[int, int]]]:
    return [[(start, min(chunk, tokens - start))] for start in range(0, tokens, chunk)]


CASES = (
    Case("prefill 16", prompt(16, 16)),
    Case("prefill 128", prompt(128, 128)),
    Case("prefill 1k", prompt(1024, 1024)),
    Case("prefill 4k", prompt(4096, 4096)),
    Case("prefill 8k", prompt(8192, 8192)),
    Case("4k in chunks of 512", prompt(4096, 512)),
    Case("8k in chunks of 512", prompt(8192, 512)),
    Case("8k in chunks of 2k", prompt(8192, 2048)),
    Case("1 new after 4k cached", [[(4095, 1)]]),
    Case("16 new after 4k cached", [[(4080, 16)]]),
    *(
        Case(f"decode {batch} at {context}", [[(context, 1)] * batch])
        for context in (64, 1024, 4096)
        for batch in (1, 8, 32)
    ),
    Case("decode 32 at 64 to 4096", [[(64 * (i // 4 * 8 + 1), 1) for i in range(32)]]),
)


class Bench:
    """A KV pool with requests in it, and both backends."""

    def __init__(self, options: argparse.Namespace) -> None:
        heads, kv_heads, width = options.heads, options.kv_heads, options.width
        self.shape = heads, kv_heads, width
        self.dtype = getattr(torch, options.dtype)
        slots = 32 * 4097 + 1
        self.keys, self.values = (torch.randn(slots, kv_heads, width, dtype=self.dtype) for _ in range(2))
        order = torch.arange(slots - 1) if options.in_order else torch.randperm(slots - 1)
        self.table = (order.int() + 1).view(32, -1)
        # A request of 8192 tokens needs two rows of the table.
        self.long = self.table[:2].reshape(1, -1)
        self.layer = RadixAttention(heads, width, width**-0.5, kv_heads, layer_id=0)

    def runs(self, case: Case, backend: Callable[[Any], Any]) -> list[Callable[[], torch.Tensor]]:
        """For each step, a function that runs it."""
        table = self.long if max(map(sum, case.steps[-1])) > self.table.shape[1] else self.table
        pool = SimpleNamespace(get_key_buffer=lambda layer_id: self.keys, get_value_buffer=lambda layer_id: self.values)
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool
        )
        return [self.run(backend(runner), step, case.name.startswith("decode")) for step in case.steps]

    def run(self, backend: Any, step: Sequence[tuple[int, int]], is_decode: bool) -> Callable[[], torch.Tensor]:
        heads, kv_heads, width = self.shape
        prefixes, news = zip(*step, strict=True)
        q, k, v = (torch.randn(sum(news), n * width, dtype=self.dtype) for n in (heads, kv_heads, kv_heads))
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if is_decode else ForwardMode.EXTEND,
            req_pool_indices=torch.arange(len(step)),
            seq_lens=torch.tensor(prefixes) + torch.tensor(news),
            extend_prefix_lens=torch.tensor(prefixes),
            extend_seq_lens=torch.tensor(news),
            out_cache_loc=None,
            encoder_lens=None,
        )

        calls = count()

        def once() -> torch.Tensor:
            if next(calls) % LAYERS == 0:  # once in a step of a model with this number of layers
                backend.init_forward_metadata(batch)
            return backend.forward(q, k, v, self.layer, batch, save_kv_cache=False)

        return once


def seconds(run: Callable[[], torch.Tensor], least: float = 0.02) -> float:
    """The CPU time of one run. A short one runs several times."""
    start, times = process_time(), 0
    while times == 0 or process_time() - start < least:
        run()
        times += 1
    return (process_time() - start) / times


def measure(bench: Bench, case: Case, rounds: int) -> tuple[float, float]:
    """The sum over the steps of the median seconds of a step, of torch_native and of ours."""
    torch.manual_seed(0)
    theirs = bench.runs(case, TorchNativeAttnBackend)
    torch.manual_seed(0)
    ours = bench.runs(case, CpuAttentionBackend)
    sums = [0.0, 0.0]
    for pair in zip(theirs, ours, strict=True):
        tolerance = 8 * torch.finfo(bench.dtype).eps
        torch.testing.assert_close(pair[1](), pair[0](), atol=tolerance, rtol=tolerance)
        times: tuple[list[float], list[float]] = [], []
        for _ in range(rounds):
            for run, taken in zip(pair, times, strict=True):
                taken.append(seconds(run))
        sums = [total + median(taken) for total, taken in zip(sums, times, strict=True)]
    return sums[0], sums[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--in-order", action="store_true", help="the slots of a request are consecutive, not random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    print(f"{'step of one layer':24}{'torch_native, ms':>18}{'ours, ms':>12}{'ratio':>8}")
    with torch.no_grad():
        for case in CASES:
            if options.only in case.name:
                theirs, ours = measure(bench, case, options.rounds)
                print(f"{case.name:24}{theirs * 1e3:18.3f}{ours * 1e3:12.3f}{theirs / ours:8.2f}", flush=True)


if __name__ == "__main__":
    main()
