"""Provides what the tests share: real servers, requests to them, and process groups over gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import requests
from forked_server import ForkedProcess
from sglang_shift.tools.servers import free_port
from two_layers import two_layer_model

SUPPORT = Path(__file__).resolve().parent
REPO = SUPPORT.parent.parent
COMMAND = ("-m", "sglang_shift.launch_server")
START_TIMEOUT = 420  # seconds; 8 ranks on 2 cores take minutes to import SGLang


def shift_flags(world: int, sp: int) -> tuple[str, ...]:
    """Return flags of a server that switches between TP of ``world`` ranks and SP. Its tests set the policy."""
    return (
        "--dtype", "float32", "--tp-size", str(world), "--sp-size", str(sp), "--enable-shift-parallel",
        "--shift-policy", "tokens", "--shift-threshold", "64",
    )  # fmt: skip


TWO_RANKS = shift_flags(2, 2)
# Prompts run in SP, in chunks. Decodes run in TP, because their batches are smaller than the threshold.
SMALL_CHUNKS = (
    "--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--shift-threshold", "20",
    "--chunked-prefill-size", "128",
)  # fmt: skip
MIXED_CHUNKS = (*SMALL_CHUNKS, "--enable-mixed-chunk", "--reasoning-parser", "qwen3", "--enable-metrics")


@dataclass
class Answer:
    """One finished request."""

    tokens: list[int]
    logprobs: list[float]
    meta: dict[str, Any]
    text: str = ""

    @classmethod
    def of(cls, body: dict[str, Any]) -> Answer:
        meta = body["meta_info"]
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs", [])]
        return cls(body["output_ids"], logprobs, meta, body["text"])

    def first(self, count: int) -> Answer:
        """Return the answer as if the request had asked for only ``count`` tokens."""
        return Answer(self.tokens[:count], self.logprobs[:count], self.meta, self.text)


@dataclass
class Server:
    """A server process in its own session, so that it can be stopped together with its children."""

    flags: list[str]
    module: list[str] = field(default_factory=lambda: list(COMMAND))
    env: dict[str, str] = field(default_factory=dict)
    forked: bool = False  # starts in a third of the time (see forked_server.py), and sleeps if it is idle

    start_seconds: ClassVar[list[float]] = []  # seconds until each server of this session was ready

    def __post_init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(tempfile.mkstemp(prefix="sglang_shift_", suffix=".log")[1])
        self.process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes] | ForkedProcess:
        env = {**os.environ, "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1", "HF_HUB_OFFLINE": "1", **self.env}
        arguments = [*self.module, "--port", str(self.port), "--host", "127.0.0.1", *self._model(), *self.flags]
        if self.forked:
            return ForkedProcess(arguments, env, self.log)
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def _model(self) -> Sequence[str]:
        """Return the flags of the model that servers share, if this one has none of its own."""
        return () if "--model-path" in self.flags else ("--model-path", two_layer_model())

    def wait_ready(self) -> Server:
        begin = time.monotonic()
        while time.monotonic() < begin + START_TIMEOUT:
            if self.process.poll() is not None:
                raise RuntimeError(f"server {self.flags} exited with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    self.start_seconds.append(time.monotonic() - begin)
                    return self
            time.sleep(0.2)
        raise RuntimeError(f"server {self.flags} not ready after {START_TIMEOUT} s:\n{self.tail()}")

    def tail(self, size: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-size:]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.unlink(missing_ok=True)

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> Any:
        response = requests.post(self.url + path, json=body, timeout=timeout)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json() if response.text.startswith(("{", "[")) else response.text

    def generate(self, ids: list[int], max_new_tokens: int = 8, **extra: Any) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        sampling.update(extra.pop("sampling_params", {}))
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, **extra}
        return Answer.of(self.post("/generate", body))

    def generate_all(self, prompts: list[list[int]], concurrency: int, max_new_tokens: int = 8) -> list[Answer]:
        """Send all prompts, from an empty prefix cache."""
        self.flush_cache()
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda ids: self.generate(ids, max_new_tokens), prompts))

    def generate_beside_decodes(self, prompts: list[list[int]]) -> list[Answer]:
        """Send all prompts at once, from an empty prefix cache. Without logprobs SGLang mixes decodes into chunks."""
        self.flush_cache()
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda ids: self.generate(ids, return_logprob=False), prompts))

    def generate_in_halves(self, prompts: list[list[int]], writer: str, reader: str) -> tuple[list[Answer], dict]:
        """Compute the first halves of prompts under one policy, and then the prompts under another one.

        Returns:
            The answers to the prompts, and the steps under the policy ``reader``, by mode.
        """
        self.flush_cache()
        with self.policy(writer):
            for ids in prompts:
                self.generate(ids[: len(ids) // 2], 1)
        with self.policy(reader) as steps:
            answers = [self.generate(ids) for ids in prompts]
        return answers, steps

    def flush_cache(self) -> None:
        for _ in range(50):  # the server refuses while it still cleans up a finished request
            if requests.post(self.url + "/flush_cache", timeout=60).status_code == 200:
                return
            time.sleep(0.1)
        raise AssertionError("the cache could not be flushed")

    def set_policy(self, policy: str, threshold: int = 256) -> None:
        """Set the policy ``tokens`` with a threshold. For ``tp`` and ``sp``, no step can cross the threshold."""
        threshold = {"tp": 10**9, "sp": 0, "tokens": threshold}[policy]
        self.set(shift_policy="tokens", shift_threshold=threshold)

    def set(self, **values: Any) -> None:
        """Change settings at run time."""
        assert self.post("/set_internal_state", {"server_args": values}) == [True]

    @property
    def state(self) -> dict[str, Any]:
        """Live counters of rank 0."""
        return requests.get(self.url + "/server_info", timeout=60).json()["internal_states"][0]["shift"]

    @contextlib.contextmanager
    def policy(self, policy: str, threshold: int = 256) -> Iterator[dict[str, int]]:
        """Run a block under a policy. When the block ends, the yielded dict holds its steps by mode."""
        self.set_policy(policy, threshold)
        before, steps = self.state["steps"], {}
        yield steps
        steps.update({mode: n - before[mode] for mode, n in self.state["steps"].items()})


class ServerPool:
    """Keeps at most one server alive. Idle servers would take the cores of the server under test."""

    def __init__(self) -> None:
        self.key: Any = None
        self.server: Server | None = None

    def get(
        self,
        *flags: str,
        module: Sequence[str] = COMMAND,
        env: dict[str, str] | None = None,
        forked: bool = True,
    ) -> Server:
        key = (flags, tuple(module), tuple((env or {}).items()), forked)
        if key != self.key or self.server is None or self.server.process.poll() is not None:
            self.stop()
            self.server, self.key = Server(list(flags), list(module), env or {}, forked), key
            self.server.wait_ready()
        return self.server

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.server = self.key = None


def session_members(session: int) -> list[int]:
    """Return the live processes of a session, without zombies."""
    members = []
    for p in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(p.pid) == session and p.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(p.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def child_process(server: Server, name: str) -> psutil.Process:
    """The first process below a server whose command line has ``name``."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if name in " ".join(child.cmdline()))


def surviving_processes(session: int) -> list[int]:
    """Return the processes of a session that still run after a minute. Killed ranks should have ended by then."""
    deadline = time.monotonic() + 60
    while (members := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return members


def run_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """Run ``function(rank, size, *args)`` in ``size`` processes of one gloo group. Raise what a rank raises."""
    import torch.multiprocessing as mp

    # The ranks are forked. Each spawned rank would import SGLang again, which takes many seconds on two cores.
    mp.start_processes(_rank_main, (size, free_port(), function, args), nprocs=size, start_method="fork")


def _rank_main(rank: int, size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        function(rank, size, *args)
    finally:
        dist.destroy_process_group()


class GlooGroup:
    """The parts of SGLang's GroupCoordinator that our code uses, over plain torch.distributed."""

    def __init__(self, ranks: list[int], group: Any) -> None:
        import torch.distributed as dist

        self.ranks, self.group = ranks, group
        self.world_size, self.rank_in_group = len(ranks), ranks.index(dist.get_rank())

    @staticmethod
    def mine(groups: list[list[int]]) -> GlooGroup:
        """Create all ``groups``, as every rank must do, and return the group of this rank."""
        import torch.distributed as dist

        created = [(ranks, dist.new_group(ranks)) for ranks in groups]
        return next(GlooGroup(ranks, group) for ranks, group in created if dist.get_rank() in ranks)

    def all_to_all_single(self, output: Any, input: Any) -> None:
        import torch.distributed as dist

        dist.all_to_all_single(output, input, group=self.group)

    def all_gather_into_tensor(self, output: Any, input: Any) -> None:
        import torch.distributed as dist

        dist.all_gather_into_tensor(output, input, group=self.group)

    def all_gather(self, x: Any, dim: int) -> Any:
        import torch

        assert dim == 0
        output = x.new_empty((self.world_size * x.shape[0], *x.shape[1:]))
        torch.distributed.all_gather_into_tensor(output, x.contiguous(), group=self.group)
        return output

    def all_reduce(self, x: Any) -> Any:
        import torch.distributed as dist

        dist.all_reduce(x, group=self.group)
        return x

    def all_gather_object(self, obj: Any) -> list[Any]:
        import torch.distributed as dist

        objects = [None] * self.world_size
        dist.all_gather_object(objects, obj, group=self.group)
        return objects


def topology_over_gloo(rank: int, world: int, sp: int, group_class: type[GlooGroup] = GlooGroup) -> Any:
    """Build the topology of ``world`` ranks, of which ``sp`` share the tokens. All ranks must call it."""
    from sglang_shift.parallel.exchange.gloo import GlooExchange
    from sglang_shift.parallel.layout import RankLayout
    from sglang_shift.parallel.topology import Topology

    layout = RankLayout(world, sp)
    plain = GlooGroup.mine(layout.sp_groups())
    group = group_class(plain.ranks, plain.group)
    base: Any = GlooGroup.mine(layout.base_tp_groups()) if world > sp else None
    return Topology(layout, rank, group, base, GlooExchange(group))  # type: ignore[arg-type]
