"""Runs SGLang's model runner in forked ranks on the CPU, stock or ours, and compares its logits with transformers.

There is no server, no scheduler and no HTTP. The ranks load a checkpoint through SGLang's loaders, and run the steps of
``trial_script`` in the modes of several patterns, on one KV pool. The ranks are forked from a process that has imported
SGLang, so a trial takes a few seconds.

    python test/support/model_trial.py llama gemma3 --tp 2 --sp 2
    python test/support/model_trial.py --stock

This prints one line for each model of ``tiny_models``. Without names it tries all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, parent_process
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random_shards
import torch
import trial_script
from forked_server import CONTEXT, IMPORTS, save_time
from sglang_shift.tools.servers import free_port

SECONDS = 180  # a trial that takes longer hangs; it takes a few seconds, or tens if the machine is busy
GRACE = 2  # seconds in which other ranks may say what they saw, after one has failed
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}


class TrialError(AssertionError):
    """A rank failed or hung, or the ranks do not agree. The text has the traceback of the rank."""


@dataclass(frozen=True)
class Outcome:
    """What a trial computed.

    Attributes:
        logits: The logits of each pattern, ``[rows, vocabulary]`` in float32. They are equal on all ranks.
        model_class: The class of the model that SGLang built. It may be SGLang's fallback for unknown models.
        weight_bytes: The memory of the weights on each rank.
    """

    logits: dict[str, torch.Tensor]
    model_class: str
    weight_bytes: int


@dataclass(frozen=True)
class Task:
    """What all ranks of a trial do."""

    flags: tuple[str, ...]
    patterns: tuple[str, ...]
    stock: bool
    port: int
    adapter: bool = False
    levels: tuple[int, ...] = ()


def trial(
    model_path: str,
    *,
    tp_size: int,
    sp_size: int | None = None,
    patterns: Sequence[str] = tuple(trial_script.PATTERNS),
    flags: Sequence[str] = (),
    stock: bool = False,
    adapter: bool = False,
    levels: Sequence[int] = (),
    seconds: float = SECONDS,
) -> Outcome:
    """Serve a checkpoint with ``tp_size`` ranks, and return the logits of all steps.

    Args:
        model_path: A folder with the checkpoint.
        tp_size: Number of ranks.
        sp_size: The value of ``--sp-size``.
        patterns: Names of :data:`trial_script.PATTERNS`. A stock runner only knows TP.
        flags: Further flags of the server.
        stock: Build SGLang's model runner, and put nothing of ours in place.
        adapter: Whether all requests have the server's first LoRA adapter.
        levels: Levels of instances. Then the patterns are those of ``level_trial``, which runs them.
        seconds: The trial fails if it takes longer.

    Raises:
        TrialError: a rank failed or hung, or the ranks computed different logits.
    """
    flags = ("--model-path", model_path, "--tp-size", str(tp_size), *COMMON_FLAGS, *flags)
    if not stock:
        flags += ("--sp-size", str(sp_size or tp_size), *SHIFT_FLAGS)
    task = Task(flags, ("tp",) if stock else tuple(patterns), stock, free_port(), adapter, tuple(levels))
    with started(task, tp_size) as ranks:
        results = ranks.results(seconds)
    first = results[0]
    for rank, other in enumerate(results):
        for pattern, logits in first.logits.items():
            # At different places of a KV pool, attention may add numbers in another order.
            equal = difference(logits, other.logits[pattern]) < TOLERANCE if levels else False
            if not equal and not torch.equal(logits.nan_to_num(), other.logits[pattern].nan_to_num()):
                raise TrialError(f"rank {rank} and rank 0 computed different logits with the pattern {pattern}")
    return first


COMMON_FLAGS = (
    "--dtype", "float32", "--device", "cpu", "--skip-tokenizer-init", "--disable-radix-cache", "--disable-cuda-graph",
    "--max-total-tokens", "1024", "--max-running-requests", "8",
)  # fmt: skip
SHIFT_FLAGS = ("--enable-shift-parallel", "--shift-policy", "tokens", "--shift-threshold", "64")


class Ranks:
    """The processes of a trial, and the pipes from them."""

    def __init__(self, task: Task, size: int, log: Path) -> None:
        self.log = log
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        with mock.patch.dict(os.environ, ENVIRONMENT):
            CONTEXT.set_forkserver_preload([*IMPORTS, "sglang.benchmark.one_batch"])
            forkserver.ensure_running()
        for rank in range(size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=rank_main, args=(rank, task, sender, str(log)), daemon=True)
            process.start()
            sender.close()  # so that the pipe ends when the rank ends
            self.pipes.append(receiver)
            self.processes.append(process)

    def results(self, seconds: float) -> list[Outcome]:
        """Wait for all ranks.

        Raises:
            TrialError: a rank failed, ended or hung.
        """
        outcomes: dict[int, Outcome] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + seconds
        waiting = dict(enumerate(self.pipes))
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in connection.wait(list(waiting.values()), left):
                rank = self.pipes.index(pipe)
                del waiting[rank]
                answer = self._receive(rank)
                if isinstance(answer, Outcome):
                    outcomes[rank] = answer
                else:
                    failures[rank] = answer
                    end = min(end, time.monotonic() + GRACE)
        if failures:
            # A rank that lost its peer only says so. The first other failure is the reason.
            rank, text = min(failures.items(), key=lambda item: any(word in item[1] for word in LOST_PEER))
            raise TrialError(f"rank {rank} failed:\n{text}")
        if waiting:
            raise TrialError(f"ranks {sorted(waiting)} did not end in {seconds:.0f} s:\n{self._stacks(waiting)}")
        return [outcomes[rank] for rank in range(len(self.pipes))]

    def _receive(self, rank: int) -> Outcome | str:
        try:
            answer = self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join(GRACE)
            return f"the process ended with {self.processes[rank].exitcode}. Its log ends with:\n{self._tail()}"
        if isinstance(answer, str):
            return answer
        arrays, *facts = answer
        return Outcome({name: torch.from_numpy(array) for name, array in arrays.items()}, *facts)

    def _stacks(self, ranks: dict[int, Any]) -> str:
        """Let ranks that hang write their stacks, and return them after the end of the log."""
        processes = [self.processes[rank] for rank in ranks]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(GRACE)
        files = [stack_file(str(self.log), process.pid) for process in processes]
        return "\n".join([self._tail(), *(file.read_text() for file in files if file.is_file())])

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        for process in self.processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
            process.join()


LOST_PEER = ("reset by peer", "closed by peer", "Connection closed", "Broken pipe")


@contextlib.contextmanager
def started(task: Task, size: int) -> Iterator[Ranks]:
    """Start the ranks. At the end of the context none is left."""
    with tempfile.TemporaryDirectory(prefix="sglang_shift_trial_") as folder:
        log = Path(folder, "log")
        log.touch()
        ranks = Ranks(task, size, log)
        try:
            yield ranks
        finally:
            ranks.stop()


def rank_main(rank: int, task: Task, pipe: Any, log: str) -> None:
    """Run a rank, in its own process, and send its outcome or its traceback."""
    prepare_process(log)
    save_time()
    answer: Any
    try:
        logits, *facts = run_rank(rank, task)
        # A tensor would be sent as a file of this process, which is about to end.
        answer = {name: tensor.numpy() for name, tensor in logits.items()}, *facts
    except BaseException:
        answer = traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):
        pipe.send(answer)
    os._exit(0)  # SGLang's groups would wait for a scheduler's shutdown


def prepare_process(log: str) -> None:
    """Write to the log, write the stacks at SIGUSR1, and end with the process that runs the trial."""
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    faulthandler.register(signal.SIGUSR1, stack_file(log, os.getpid()).open("wb"))
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.update(ENVIRONMENT)


def stack_file(log: str, pid: int) -> Path:
    """Where a rank writes its stacks. In the log, the lines of several ranks would mix."""
    return Path(f"{log}.{pid}")


def end_with_parent() -> None:
    """End this process when the one that runs the trial ends."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def run_rank(rank: int, task: Task) -> tuple[dict[str, torch.Tensor], str, int]:
    """Build the model runner as a scheduler's process does, and run all patterns. Return the fields of an outcome."""
    from sglang.srt.model_loader import loader
    from sglang_shift import seams

    server_args = resolve(task)
    if not task.stock:
        seams.install()
    if "dummy" in task.flags:
        loader.initialize_dummy_weights = random_shards.fill
    runner = build_runner(rank, task, server_args)
    if task.levels:
        import level_trial

        return level_trial.run(runner, task.levels, task.patterns)
    adapter = next(iter(runner.lora_manager.lora_refs)) if task.adapter else None
    logits = {name: run_pattern(runner, trial_script.PATTERNS[name], task.stock, adapter) for name in task.patterns}
    return logits, type(runner.model).__name__, storage_bytes(runner.model.parameters())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the memory of tensors. Each storage counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resolve(task: Task) -> Any:
    """Return the server arguments, resolved as the launcher resolves them."""
    from sglang_shift.args.server_args import prepare_server_args

    args = prepare_server_args([*task.flags, "--nccl-port", str(task.port)])
    args.resolve_once()
    args.check_server_args()  # it also reads the paths of LoRA adapters
    return args


def build_runner(rank: int, task: Task, server_args: Any) -> Any:
    """Return the model runner of this rank, with its KV pool and attention backend."""
    from sglang.benchmark import one_batch
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import SpawnRanks, get_device, publish, spawn_world_rank
    from sglang_shift.runtime.model_runner import ShiftModelRunner

    world_rank = spawn_world_rank(server_args, tp_rank=rank, pp_rank=0)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, gpu_id=rank))
    one_batch._init_process_global_configs()
    model_config = ModelConfig.from_server_args(server_args)
    bootstrap.init_parallel_runtime(server_args=server_args, device=get_device().device, dist_port=task.port)
    bootstrap.init_layer_runtime(model_config=model_config)
    runner = (ModelRunner if task.stock else ShiftModelRunner)(
        model_config=model_config,
        mem_fraction_static=0.5,
        gpu_id=rank,
        nccl_port=task.port,
        server_args=server_args,
    )
    one_batch.TreeCacheNamespace = with_pages_of_the_pool(one_batch.TreeCacheNamespace)
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    if mambaish_config(runner.model_config) is not None:
        from sglang.kernels.ops.mamba.triton_ops import initialize_mamba_selective_state_update_backend

        initialize_mamba_selective_state_update_backend(server_args)
    runner.init_cuda_graphs()
    return runner


def with_pages_of_the_pool(make: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's benchmark takes the page size of the flags. With ``--dcp-size``, pages have D times as many tokens."""

    def make_cache(token_to_kv_pool_allocator: Any, **fields: Any) -> Any:
        fields["page_size"] = token_to_kv_pool_allocator.page_size
        return make(token_to_kv_pool_allocator=token_to_kv_pool_allocator, **fields)

    return make_cache


def run_pattern(
    runner: Any,
    pattern: str,
    stock: bool,
    adapter: str | None = None,
    before_step: Callable[[int, Any], None] = lambda number, batch: None,
) -> torch.Tensor:
    """Run all steps from an empty KV pool, each in its mode, and return their logits.

    ``before_step`` gets the number of each step, and the batch of the step before.
    """
    from sglang.benchmark import one_batch
    from sglang_shift.modes import Mode

    vocabulary = runner.model_config.vocab_size
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    requests: dict[int, Any] = {}
    rows, batch = [], None
    for number, (step, letter) in enumerate(zip(trial_script.steps(vocabulary), pattern, strict=True)):
        before_step(number, batch)
        mode = Mode.SP if letter == "s" else Mode.TP
        with contextlib.nullcontext() if stock else runner.running_in(mode):
            if step.decode:
                places = {id(requests[number]): number for number in requests}
                keep = [i for i, request in enumerate(batch.reqs) if places[id(request)] in step.tokens]
                batch.filter_batch(keep_indices=keep)
                ids = torch.tensor([step.tokens[places[id(request)]][0] for request in batch.reqs])
                _, logits = one_batch.decode(ids, batch, runner)
            else:
                chunk = [extended(requests, number, tokens, adapter) for number, tokens in step.tokens.items()]
                _, logits, batch = one_batch.extend(chunk, runner)
        for request, tokens in step.tokens.items():
            if step.decode:
                requests[request].full_untruncated_fill_ids.extend(tokens)
        rows.append(logits[:, :vocabulary].float().clone())
    return torch.cat(rows)


def extended(requests: dict[int, Any], number: int, tokens: list[int], adapter: str | None = None) -> Any:
    """Return a request that computes ``tokens`` next. Its earlier tokens are its cached prefix."""
    from array import array

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    if number not in requests:
        sampling = SamplingParams(temperature=0, max_new_tokens=64)
        request = Req(str(number), "", array("q", tokens), sampling, lora_id=adapter)
        request.full_untruncated_fill_ids = array("q")
        request.logprob_start_len = -1
        requests[number] = request
    request = requests[number]
    request.prefix_len = len(request.full_untruncated_fill_ids)
    request.full_untruncated_fill_ids.extend(tokens)
    request.extend_end = len(request.full_untruncated_fill_ids)
    return request


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance of a logit from its expected value, in standard deviations of the expected logits."""
    if not bool(logits.isfinite().all()):
        return float("inf")
    return float((logits - expected).abs().max() / expected.std())


def report(name: str, arguments: argparse.Namespace, folder: str) -> str:
    """Try one model, and return the line that says how it went."""
    import tiny_models

    model = tiny_models.MODELS[name]
    begin = time.monotonic()
    try:
        expected = tiny_models.write(model, folder)
    except Exception as error:
        return f"NO CHECKPOINT {type(error).__name__}: {error}" + (traceback.format_exc() if arguments.verbose else "")
    written = time.monotonic()
    flags = (*model.flags, *arguments.flags.split())
    try:
        outcome = trial(folder, tp_size=arguments.tp, sp_size=arguments.sp, flags=flags, stock=arguments.stock)
    except TrialError as error:
        return f"FAILED  {error if arguments.verbose else reason(str(error))}"
    tp = outcome.logits["tp"]
    expected = tp if expected is None else expected
    parts = [f"[{outcome.model_class}] std {expected.std():.2f}"]
    for pattern, logits in outcome.logits.items():
        same = bool((logits.argmax(-1) == expected.argmax(-1)).all())
        against_tp = "" if pattern == "tp" else f" (tp {difference(logits, tp):.1e})"
        parts.append(f"{pattern} {difference(logits, expected):.1e}{against_tp}{'' if same else ' OTHER TOKENS'}")
    if arguments.verbose:  # by row: the requests of the prefill, then the decodes, and so on
        parts.append(" ".join(f"{difference(a, b):.0e}" for a, b in zip(tp, expected, strict=True)))
    worst = max(difference(logits, expected) for logits in outcome.logits.values())
    seconds = f"{written - begin:.1f} + {time.monotonic() - written:.1f} s"
    return " | ".join([f"{'EQUAL  ' if worst < TOLERANCE else 'DIFFERS'}", *parts, seconds])


# In float32 a rounding is 6e-8 of a number. Sums of some hundred terms in another order, through three layers, differ
# by about 1e-5 of the logits. A wrong row, head or expert changes them by about their standard deviation.
TOLERANCE = 1e-4


def reason(text: str) -> str:
    """Return the error and the last places of a traceback in one line."""
    lines = text.strip().splitlines()
    places = []
    for line in lines:
        if line.strip().startswith("File "):
            file, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
            if "/torch/" not in file:
                places.append("/".join(Path(file).parts[-2:]) + ":" + number)
    return f"{lines[-1][:300]} @ {' < '.join(reversed(places[-4:]))}"


def main() -> None:
    import tiny_models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of tiny_models; all if none is given")
    parser.add_argument("--stock", action="store_true", help="run SGLang's model runner")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--sp", type=int)
    parser.add_argument("--flags", default="", help="further flags of the server, in one string")
    parser.add_argument("--verbose", action="store_true", help="print whole tracebacks")
    arguments = parser.parse_args()
    for name in arguments.names or tiny_models.MODELS:
        with tempfile.TemporaryDirectory(prefix="sglang_shift_tiny_") as folder:
            print(f"{name:18s} {report(name, arguments, folder)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
