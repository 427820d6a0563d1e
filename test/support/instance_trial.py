"""Runs SGLang's schedulers of several ranks in forked processes, and is their controller and their detokenizer.

There is no HTTP. Requests go to the input sockets of the schedulers, and answers come from their output sockets, as in
a server. The event loops are SGLang's own. So requests are in flight when a level changes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from forked_server import CONTEXT, IMPORTS, save_time
from model_trial import ENVIRONMENT, TrialError, prepare_process
from sglang_shift.tools.servers import free_port

SECONDS = 60  # a wait that takes longer hangs
FLAGS = (
    "--dtype", "float32", "--device", "cpu", "--disable-cuda-graph", "--skip-server-warmup", "--random-seed", "7",
    "--max-running-requests", "16", "--chunked-prefill-size", "64", "--log-level", "info",
)  # fmt: skip
SHIFT_FLAGS = ("--enable-shift-parallel", "--shift-check", "off")
MODE_FLAGS = ("--shift-policy", "tokens", "--shift-threshold", "8")


@dataclass(frozen=True)
class Call:
    """Asks the ranks of an instance to run a function between two steps, and to send what it returns.

    Attributes:
        function: A function of a module. It gets the scheduler.
        arguments: More arguments.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Returned:
    """What a rank returned for a call."""

    rank: int
    value: Any


@dataclass
class Output:
    """What the detokenizer has received of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float | None] = field(default_factory=list)
    decode_ids: list[int] = field(default_factory=list)
    chunks: int = 0
    cached: int = 0
    retractions: int = 0
    reason: dict[str, Any] | None = None


@dataclass
class World:
    """The schedulers of a world, and what they have sent.

    Attributes:
        folder: Where the sockets and the log are.
        size: The number of ranks.
        outputs: What was received, by the ids of the requests.
        messages: What the controller has received.
        leaders: The first ranks of the instances.
        reads_outputs: Whether the detokenizer reads what the ranks send to it. If not, it stands still.
    """

    folder: Path
    size: int
    stock: bool
    processes: list[Any] = field(default_factory=list)
    pipes: list[Any] = field(default_factory=list)
    outputs: dict[str, Output] = field(default_factory=dict)
    messages: list[Any] = field(default_factory=list)
    epoch: int = 0
    leaders: list[int] = field(default_factory=list)
    reads_outputs: bool = True

    def open(self) -> None:
        """Bind the sockets to which the ranks connect."""
        import zmq
        from sglang_shift.runtime.instance_channels import answers_of, input_of
        from sglang_shift.runtime.read_receipts import ReceiptWriter

        context = zmq.Context()
        self.receipts = ReceiptWriter()
        ports = ports_in(self.folder)
        shared = (ports.scheduler_input_ipc_name, ports.tokenizer_ipc_name)
        inputs, answers = shared if self.stock else (None, answers_of(ports))
        self.inputs = []
        for rank in range(self.size):
            self.inputs.append(context.socket(zmq.PUSH))
            self.inputs[-1].bind(inputs or input_of(ports, rank))
        self.received = [context.socket(zmq.PULL) for _ in range(2)]
        for socket, address in zip(self.received, (ports.detokenizer_ipc_name, answers), strict=True):
            socket.bind(address)

    def send(self, rank: int, message: Any) -> None:
        """Send a message to a rank, as the controller does."""
        import msgspec
        from sglang.srt.managers.io_struct import sock_send, wrap_as_pickle

        sock_send(self.inputs[rank], message if isinstance(message, msgspec.Struct) else wrap_as_pickle(message))

    def submit(self, rank: int, rid: str, ids: Sequence[int], tokens: int, **options: Any) -> None:
        """Send a request to the leader ``rank``. Options are fields of the request, or sampling parameters."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        names = TokenizedGenerateReqInput.__struct_fields__
        fields = {key: options.pop(key) for key in list(options) if key in names}
        sampling = SamplingParams(max_new_tokens=tokens, **{"temperature": 0.0, "ignore_eos": True, **options})
        sampling.normalize(object())  # a tokenizer is only asked for strings that end an output
        required = {
            "input_text": None, "input_embeds": None, "mm_inputs": None, "token_type_ids": None, "stream": True,
            "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": None,
        }  # fmt: skip
        request = TokenizedGenerateReqInput(
            rid=rid, input_ids=array("q", ids), sampling_params=sampling, **{**required, **fields}
        )
        self.outputs[rid] = Output()
        self.send(rank, request)

    def poll(self, seconds: float = 0.05) -> None:
        """Receive what the ranks have sent.

        Raises:
            TrialError: a rank has failed.
        """
        import zmq
        from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput, sock_recv
        from sglang_shift.runtime.read_receipts import ReceiptReq

        poller = zmq.Poller()
        for socket in self.received if self.reads_outputs else self.received[1:]:
            poller.register(socket, zmq.POLLIN)
        for socket, _ in poller.poll(1000 * seconds):
            with contextlib.suppress(zmq.Again):
                while True:
                    message = sock_recv(socket, zmq.NOBLOCK)
                    if isinstance(message, BatchTokenIDOutput):
                        self._collect(message)
                    elif isinstance(message, ReceiptReq):
                        self.receipts.write(message)
                    elif isinstance(message, AbortReq):  # of a request that was not running
                        self.outputs[message.rid].reason = {"type": "abort"}
                    else:
                        self.messages.append(message)
        for rank, pipe in enumerate(self.pipes):
            if pipe.poll():
                raise TrialError(f"rank {rank} failed:\n{self._reason(rank)}")

    def _reason(self, rank: int) -> str:
        try:
            return str(self.pipes[rank].recv())
        except EOFError:
            return f"the process ended. Its log ends with:\n{self.tail()}"

    def tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-6000:]

    def _collect(self, batch: Any) -> None:
        for number, rid in enumerate(batch.rids):
            output = self.outputs.setdefault(rid, Output())
            output.tokens += batch.output_ids[number]
            output.decode_ids += batch.decode_ids[number]
            output.chunks += 1
            output.cached = batch.cached_tokens[number]
            output.retractions = batch.retraction_counts[number]
            if batch.output_token_logprobs_val:
                output.logprobs += batch.output_token_logprobs_val[number]
                output.input_logprobs += batch.input_token_logprobs_val[number]
            if output.reason is not None:
                raise TrialError(f"request {rid} has ended twice")
            output.reason = batch.finished_reasons[number]

    def wait(self, done: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        """Receive until ``done`` is true."""
        end = time.monotonic() + seconds
        while not done():
            self.poll()
            if time.monotonic() > end:
                raise TrialError(f"{what} did not happen in {seconds:.0f} s:\n{self.tail()}")

    def wait_tokens(self, tokens: dict[str, int]) -> None:
        """Wait until each request has as many tokens, or has ended."""
        outputs = self.outputs
        self.wait(
            lambda: all(len(outputs[rid].tokens) >= n or outputs[rid].reason for rid, n in tokens.items()),
            f"{tokens} tokens",
        )

    def wait_end(self, rids: Sequence[str] | None = None) -> dict[str, list[int]]:
        """Wait until requests have ended, all if none is given, and return their tokens."""
        rids = list(self.outputs) if rids is None else rids
        self.wait(lambda: all(self.outputs[rid].reason for rid in rids), f"the end of {rids}")
        return {rid: self.outputs[rid].tokens for rid in rids}

    def look_away(self, seconds: float) -> None:
        """Let the detokenizer stand still for some seconds."""
        self.reads_outputs = False
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.poll()
        self.reads_outputs = True

    def wait_failure(self) -> None:
        """Wait until all ranks have ended, because one of them failed.

        Raises:
            TrialError: a rank goes on.
        """
        with contextlib.suppress(TrialError):
            self.wait(lambda: False, "a failure")
        end = time.monotonic() + SECONDS
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                raise TrialError(f"rank {rank} goes on after another one failed:\n{self.tail()}")

    def change(self, first: int, ranks: int, level: int) -> Any:
        """Ask for a change of the level, and return the answer."""
        self.ask(first, ranks, level)
        return self.answer()

    def ask(self, first: int, ranks: int, level: int) -> None:
        """Ask the leaders for a change of the level."""
        from sglang_shift.instances.messages import ChangeLevelReq

        self.epoch += 1
        for leader in self.leaders:
            if first <= leader < first + ranks:
                self.send(leader, ChangeLevelReq(self.epoch, first, ranks, level, "a test"))

    def answer(self) -> Any:
        """Wait for the answer to the last request for a change, and return it."""
        from sglang_shift.instances.messages import LevelChanged

        def answers() -> list[Any]:
            return [each for each in self.messages if isinstance(each, LevelChanged) and each.epoch == self.epoch]

        self.wait(lambda: bool(answers()), f"change {self.epoch}")
        changed = answers()[0]
        if changed.ok:
            ranks = range(changed.first, changed.first + changed.ranks)
            others = [leader for leader in self.leaders if leader not in ranks]
            self.leaders = sorted([*others, *ranks[:: changed.level]])
        return changed

    def merge(self) -> Any:
        """Merge all ranks into one instance, and return the answer."""
        return self._made(self.size)

    def split(self) -> Any:
        """Split all ranks into instances of one rank, and return the answer."""
        return self._made(1)

    def _made(self, level: int) -> Any:
        changed = self.change(0, self.size, level)
        assert changed.ok, changed.reason
        return changed

    def renew(self) -> None:
        """Let all requests end, look for leaks, split, and forget the cached prefixes."""
        self.wait_end()
        self.outputs.clear()
        assert self.problems() == []
        if self.leaders == [0]:
            self.split()
        assert self.problems() == []
        assert all(self.call(forget_prefixes))

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function on all ranks, each instance between two steps, and return the results."""
        before = len(self.messages)
        for leader in self.leaders:
            self.send(leader, Call(function, arguments))

        def returned() -> dict[int, Any]:
            return {each.rank: each.value for each in self.messages[before:] if isinstance(each, Returned)}

        self.wait(lambda: len(returned()) == self.size, f"{function.__name__} on all ranks")
        return [returned()[rank] for rank in range(self.size)]

    def problems(self) -> list[str]:
        """What :func:`problems` says about all ranks, once no request is left."""
        self.wait(lambda: all(self.call(is_idle)), "an idle world")
        return [f"rank {rank}: {text}" for rank, texts in enumerate(self.call(problems)) for text in texts]

    def stop(self) -> None:
        """Kill the ranks, and remove the shared memory that they leave."""
        left = [f"sglang_loads_{self.folder.name}_*"]
        for process in self.processes:
            process.kill()
            process.join()
            left.append(f"sgl_shm_mq_{process.pid}_*")
        for file in (file for pattern in left for file in Path("/dev/shm").glob(pattern)):
            file.unlink(missing_ok=True)


def ports_in(folder: Path) -> Any:
    from sglang.srt.server_args import PortArgs

    names = (
        "tokenizer_ipc_name",
        "scheduler_input_ipc_name",
        "detokenizer_ipc_name",
        "rpc_ipc_name",
        "metrics_ipc_name",
    )
    return PortArgs(
        nccl_port=int((folder / "port").read_text()),
        tokenizer_worker_ipc_name=None,
        decoupled_spec_ipc_config=None,
        instance_id=folder.name,
        **{name: f"ipc://{folder}/{name}" for name in names},
    )


@contextlib.contextmanager
def started(
    size: int, flags: Sequence[str] = (), *, instances: int = 0, modes: Sequence[str] = MODE_FLAGS
) -> Iterator[World]:
    """Start the ranks of a world. At the end of the context none is left.

    Args:
        size: The number of ranks.
        flags: Flags besides :data:`FLAGS`.
        instances: The instances at the start. With 0 these are SGLang's schedulers, and nothing of ours is in place.
        modes: Flags that say how the mode of a step is chosen.
    """
    with tempfile.TemporaryDirectory(prefix="shift_w_") as name, mock.patch.dict(os.environ, ENVIRONMENT):
        folder = Path(name)
        (folder / "port").write_text(str(free_port()))
        (folder / "log").touch()
        CONTEXT.set_forkserver_preload([*IMPORTS, "sglang.benchmark.one_batch"])
        own = (*SHIFT_FLAGS, *modes, "--instances", str(instances)) if instances else ()
        world = World(folder, size, stock=not instances)
        world.open()
        world.leaders = list(range(0, size, size // (instances or size)))
        try:
            for rank in range(size):
                receiver, sender = CONTEXT.Pipe(duplex=False)
                task = (rank, (*FLAGS, "--tp-size", str(size), *own, *flags), not instances, str(folder), sender)
                world.processes.append(CONTEXT.Process(target=rank_main, args=task, daemon=True))
                world.processes[-1].start()
                sender.close()
                world.pipes.append(receiver)
            for rank, pipe in enumerate(world.pipes):
                if not pipe.poll(SECONDS):
                    raise TrialError(f"rank {rank} did not start in {SECONDS} s:\n{world.tail()}")
                if (text := world._reason(rank)) != "ready":
                    raise TrialError(f"rank {rank} failed:\n{text}")
            yield world
        finally:
            world.stop()


def rank_main(rank: int, flags: tuple[str, ...], stock: bool, folder: str, pipe: Any) -> None:
    """Run a scheduler, in its own process, and send a traceback if it fails."""
    prepare_process(f"{folder}/log")
    save_time()
    try:
        scheduler = make_scheduler(rank, flags, stock, Path(folder))
        pipe.send("ready")
        scheduler.run_event_loop()
    except BaseException:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(traceback.format_exc())
    os._exit(0)


def make_scheduler(rank: int, flags: tuple[str, ...], stock: bool, folder: Path) -> Any:
    """Build a scheduler as SGLang's run_scheduler_process does."""
    import logging

    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang_shift import seams
    from sglang_shift.args.server_args import prepare_server_args

    logging.basicConfig(level=logging.INFO, format=f"[{rank} %(relativeCreated)d] %(message)s", force=True)
    args = prepare_server_args([*flags, "--nccl-port", (folder / "port").read_text()])
    args.resolve_once()
    args.check_server_args()
    ports = ports_in(folder)
    if stock:
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
        return Scheduler(args, ports)
    seams.install()
    from sglang_shift.runtime.instance_channels import ports_of_rank
    from sglang_shift.runtime.instance_scheduler import InstanceScheduler

    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=rank, gpu_id=rank))

    class TrialScheduler(InstanceScheduler):
        armed: Any = None

        def ingest_requests(self, *args: Any, **kwargs: Any) -> Any:
            """Change the level at a moment for which :func:`change_in_chunk` asks."""
            chunk = self.chunked_req
            if self.armed is not None and chunk is not None and (chunk.extend_end or 0) > 64:
                self._change, self.armed = self.armed, None
            return super().ingest_requests(*args, **kwargs)

        def init_request_dispatcher(self) -> None:
            super().init_request_dispatcher()
            self._request_dispatcher._mapping[Call] = self.answer_call

        def answer_call(self, call: Call) -> None:
            self.tell_controller(Returned(self.shift_switch.place.rank, call.function(self, *call.arguments)))

    return TrialScheduler(args, ports_of_rank(ports, rank))


def change_in_chunk(scheduler: Any, request: Any) -> None:
    """Let the instance change its level while it computes a long prompt, after its second chunk."""
    scheduler.armed = request


def outputs_of_stock(flags: Sequence[str], requests: Mapping[str, Sequence[Any]]) -> dict[str, Output]:
    """What each request gets on one rank of stock SGLang, one after the other and without cached prefixes.

    Args:
        flags: The flags of the rank.
        requests: By the id of each request: its prompt, its number of new tokens, and its options if it has some.
    """
    with started(1, (*flags, "--disable-radix-cache")) as world:
        for rid, (ids, tokens, *options) in requests.items():
            world.submit(0, rid, ids, tokens, **dict(*options))
            world.wait_end([rid])
        return world.outputs


def tokens_of_stock(flags: Sequence[str], requests: Mapping[str, Sequence[Any]]) -> dict[str, list[int]]:
    """The tokens of :func:`outputs_of_stock`."""
    return {rid: output.tokens for rid, output in outputs_of_stock(flags, requests).items()}


def forget_prefixes(scheduler: Any) -> bool:
    return bool(scheduler.flush_cache())


def is_idle(scheduler: Any) -> bool:
    return bool(scheduler.is_fully_idle())


def problems(scheduler: Any) -> list[str]:
    """What SGLang's own checks and ours say about an idle scheduler."""
    import level_trial

    leaks, messages = scheduler.invariant_checker._check_all_pools(scheduler.pool_stats_observer.get_pool_stats())
    found = messages if leaks else []
    scheduler.invariant_checker._check_req_pool()
    scheduler.invariant_checker._check_tree_cache()
    switch = scheduler.shift_switch
    whole = switch.weights
    kept = (
        [switch, whole, whole.model, whole.sp_model, whole.sp_model.weights]
        if switch.level < switch.levels.world_size
        else [switch]
    )
    stale = {}
    for size, place in switch.places.items():
        if size != switch.level:
            for group in (place.group, place.group.device_group, place.group.cpu_group):
                stale[id(group)] = f"the group of level {size}"
    return [*found, *level_trial.reachable(scheduler, stale, {id(each) for each in kept})]


def tokens_of_batches(scheduler: Any) -> dict[str, list[int]]:
    """The tokens so far of all live requests."""
    batches = [each for each in (scheduler.running_batch, scheduler.last_batch) if each is not None]
    reqs = [req for batch in batches for req in batch.reqs] + scheduler.waiting_queue
    return {req.rid: list(req.output_ids) for req in reqs}


def prompt(number: int, length: int) -> list[int]:
    """A prompt of made-up tokens. Prompts of different numbers differ from their first token on."""
    return [5 + (number * 7919 + j * 104729 + (j * j * 31) % 977) % 4000 for j in range(length)]
