#!/usr/bin/env python3
"""Count the Python calls and the PyTorch operators of one decoder layer: in stock TP, in our TP and in SP.

    python benchmark/calls_per_layer.py
    python benchmark/calls_per_layer.py --config path/to/config.json

On a GPU, a small step without a CUDA graph takes as long as Python needs to launch it. So each call that a layer adds
costs time. The counts are exact: models with two and with four layers run the same decode step on two CPU ranks, and
half of the difference is one layer. Weights are random. Stock SGLang has no SP mode.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test/support"))

RANKS = 2
LAYERS = (2, 4)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
Counts = dict[str, tuple[int, int]]
"""Python calls and operators, by contender: ``stock TP``, ``TP`` and ``SP``."""


def count_steps(rank: int, task: Any, results: Any) -> None:
    """Run decode steps on one rank. Rank 0 puts the counts of the model's forward into ``results``."""
    import model_trial
    import torch
    from sglang.benchmark import one_batch
    from sglang_shift import seams
    from sglang_shift.modes import Mode

    torch.set_num_threads(1)
    server_args = model_trial.resolve(task)
    if not task.stock:
        seams.install()
    runner = model_trial.build_runner(rank, task, server_args)
    requests: dict[int, Any] = {}
    _, _, batch = one_batch.extend([model_trial.extended(requests, n, [5, 6, 7]) for n in range(2)], runner)
    counts: Counts = {}
    for mode in (Mode.TP,) if task.stock else (Mode.TP, Mode.SP):
        runner.mode = mode
        for counter in (None, count_calls, count_operators):  # the first step warms up
            forward = runner.model.forward
            numbers: list[int] = []
            if counter is not None:
                runner.model.forward = counter(forward, numbers)
            try:
                one_batch.decode(torch.tensor([8, 9]), batch, runner)
            finally:
                vars(runner.model).pop("forward", None)
            if numbers:
                key = "stock TP" if task.stock else mode.name
                counts[key] = (*counts.get(key, ()), numbers[0])  # type: ignore[assignment]
    if rank == 0:
        results.put(counts)


def count_calls(forward: Any, numbers: list[int]) -> Any:
    """Return ``forward`` with a counter of the Python functions that it calls."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls = 0

        def profile(frame: FrameType, event: str, arg: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(profile)
        try:
            return forward(*args, **kwargs)
        finally:
            sys.setprofile(None)
            numbers.append(calls)

    return counted


def count_operators(forward: Any, numbers: list[int]) -> Any:
    """Return ``forward`` with a counter of the operators that it dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    def counted(*args: Any, **kwargs: Any) -> Any:
        with Operators() as operators:
            out = forward(*args, **kwargs)
        numbers.append(operators.count)
        return out

    return counted


def counts_of(config: dict[str, Any], layers: int) -> Counts:
    """Count the steps of a model with this many layers, in all contenders."""
    import model_trial
    import torch.multiprocessing as mp

    counts: Counts = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        for stock in (True, False):
            flags = (
                "--model-path",
                folder,
                "--tp-size",
                str(RANKS),
                "--load-format",
                "dummy",
                *model_trial.COMMON_FLAGS,
            )
            if not stock:
                flags += ("--sp-size", str(RANKS), *model_trial.SHIFT_FLAGS)
            task = model_trial.Task(flags, (), stock, model_trial.free_port())
            results = mp.get_context("fork").SimpleQueue()
            mp.start_processes(count_steps, (task, results), nprocs=RANKS, start_method="fork")
            counts |= results.get()
    return counts


def per_layer(config: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return Python calls and operators of one layer, by contender."""
    few, many = (counts_of(config, layers) for layers in LAYERS)
    added = LAYERS[1] - LAYERS[0]
    return {name: ((many[name][0] - few[name][0]) / added, (many[name][1] - few[name][1]) / added) for name in many}


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json of the model; default: a small Llama")
    arguments = parser.parse_args()
    config = LLAMA if arguments.config is None else json.loads(arguments.config.read_text())
    import sglang.srt.managers.scheduler  # noqa: F401 (the ranks are forked from this process)

    print(f"{'one layer':10} {'Python calls':>12} {'operators':>10}")
    for name, (calls, operators) in per_layer(config).items():
        print(f"{name:10} {calls:12.1f} {operators:10.1f}")


if __name__ == "__main__":
    main()
