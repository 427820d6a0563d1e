"""The real SGLang: its answers in tp, sp and shift equal those of one rank.

On one GPU two ranks share it: over gloo, whose collectives take CUDA tensors by way of the host, without CUDA
graphs; and over NCCL with them, where NCCL lets two ranks have one GPU. Their speed means nothing.
"""

from __future__ import annotations

import os
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from sglang_shift.benchmark.servers import Server, call, serving
from sglang_shift.errors import ShiftError
from sglang_shift.gpu_check import environment, one_gpu
from sglang_shift.gpu_check.answers import Answer, compare, prompts, requests
from sglang_shift.gpu_check.record import Record, Skip
from sglang_shift.random_model import write_random_model

MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,  # of 128: FlashInfer has no kernels for some other sizes
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
VOCABULARY = 4096
"""The demo model's, whose tokenizer it has."""

TOLERANCE = 0.1
"""Of a logprob in bfloat16. This model's logits spread over about 0.6: exchanged heads differ by as much."""

REQUESTS = 16
"""At most at once: no decode step has more tokens, nor do CUDA graphs pad it to more."""

THRESHOLDS = {"tp": 10**9, "sp": 0, "shift": REQUESTS}
"""Of the policy ``tokens``: no step, every step, or prompts only are above it."""

EXPECTED = {"tp": {"tp"}, "sp": {"sp"}, "shift": {"tp", "sp"}}
"""In which modes steps then run."""

START_SECONDS, ANSWER_SECONDS = 150, 120

COMMON = [
    *("--dtype", "bfloat16", "--sampling-backend", "pytorch", "--mem-fraction-static", "0.3"),
    *("--max-total-tokens", "16384", "--max-running-requests", str(REQUESTS), "--chunked-prefill-size", "512"),
    *("--skip-server-warmup", "--random-seed", "0"),
]
GRAPHS = ["--cuda-graph-max-bs-decode", str(REQUESTS), "--cuda-graph-max-bs-prefill", "512"]
EAGER = ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
SHARING = ["--disable-custom-all-reduce"]
"""It maps memory between GPUs."""


def check_triton(record: Record) -> None:
    """One rank, and two on the same GPU, with Triton's attention."""
    check_one_gpu(record, "triton")


def check_flashinfer(record: Record) -> None:
    """The same with FlashInfer's."""
    # Its other way to prefill has kernels that take minutes to compile.
    os.environ.setdefault("SGLANG_FLASHINFER_USE_PAGED", "1")
    check_one_gpu(record, "flashinfer")


def check_one_gpu(record: Record, attention: str) -> None:
    """TP=1, then two ranks over each backend that can."""
    with TemporaryDirectory(prefix="sglang_shift_") as name:
        folder = Path(name)
        comparison = Comparison(record, attention, _model(folder), VOCABULARY, TOLERANCE)
        comparison.take_reference(["--attention-backend", attention, *GRAPHS])
        for backend, graphs in (("gloo", EAGER), ("nccl", GRAPHS)):
            try:
                variables = one_gpu.environment(backend, folder / backend)
            except Skip as reason:
                record.note(f"two ranks over {backend}: skipped: {reason}")
                continue
            flags = ["--attention-backend", attention, "--tp-size", "2", *graphs, *SHARING]
            comparison.run(f"two ranks over {backend}", flags, variables)


def check_several(record: Record) -> None:
    """TP=1, then as many GPUs as the model can be divided by, at every S."""
    ranks = max(size for size in (2, 4, 8) if size <= environment.gpus())
    with TemporaryDirectory(prefix="sglang_shift_") as name:
        comparison = Comparison(record, "gpus", _model(Path(name)), VOCABULARY, TOLERANCE)
        comparison.take_reference(GRAPHS)
        for sp in (size for size in (2, 4, 8) if size <= ranks):
            comparison.run(f"P={ranks}, S={sp}", ["--tp-size", str(ranks), "--sp-size", str(sp), *GRAPHS])


def _model(folder: Path) -> list[str]:
    write_random_model(folder / "model", **MODEL)
    return ["--model-path", str(folder / "model"), *COMMON]


class Comparison:
    """Servers of one model, whose answers are held against those of one rank.

    Args:
        record: Where differences and figures go; its folder has the servers' logs.
        name: Of these logs.
        flags: Of every server.
        vocabulary: Of the model, for prompts.
        tolerance: Of a logprob.
    """

    def __init__(self, record: Record, name: str, flags: list[str], vocabulary: int, tolerance: float) -> None:
        self.record, self.name, self.flags, self.tolerance = record, name, flags, tolerance
        self.prompts = prompts(vocabulary)
        self.reference: list[Answer] = []

    def take_reference(self, flags: list[str]) -> None:
        """The answers of one rank, by our launcher.

        Raises:
            ShiftError, OSError, HTTPException: it does not start, or does not answer.
        """
        start = monotonic()
        with serving([*self.flags, "--tp-size", "1", *flags], 0, self._log("TP1"), START_SECONDS) as server:
            ready = monotonic() - start
            self.reference = self._ask(server)
        self.record.row(server="TP=1", start_seconds=round(ready, 1))

    def run(self, label: str, flags: list[str], variables: dict[str, str] | None = None) -> None:
        """Compare a server with these flags in every mode; what goes wrong is a problem, not an exception."""
        flags = [*self.flags, *flags, "--enable-shift-parallel", "--shift-policy", "tokens"]
        start = monotonic()
        try:
            with serving(flags, 0, self._log(label), START_SECONDS, variables) as server:
                ready = monotonic() - start
                for mode in THRESHOLDS:
                    self._compare(server, label, mode, ready)
        except (ShiftError, OSError, HTTPException, ValueError) as error:
            self.record.problem(f"{label}: {explained(error)}")

    def _compare(self, server: Server, label: str, mode: str, ready: float) -> None:
        wanted = {"shift_policy": "tokens", "shift_threshold": THRESHOLDS[mode]}
        call(server.url + "/set_internal_state", body={"server_args": wanted})
        before = state(server)["steps"]
        found = compare(self._ask(server), self.reference, self.tolerance)
        now = state(server)
        steps = {name: count - before[name] for name, count in now["steps"].items()}
        self.record.row(
            server=label,
            start_seconds=round(ready, 1),
            mode=mode,
            tokens=found.compared,
            ties=found.ties,
            worst_logprob_difference=found.worst,
            steps=steps,
            exchange=now.get("exchange"),
        )
        self.record.note(
            f"{label}, {mode}: {found.compared} tokens, {found.ties} ties, logprobs within {found.worst:.2g}; "
            f"steps {steps}; exchange {now.get('exchange')}"
        )
        for problem in found.problems:
            self.record.problem(f"{label}, {mode}: {problem}")
        if {name for name, count in steps.items() if count} != EXPECTED[mode]:
            self.record.problem(f"{label}, {mode}: the steps ran as {steps}")

    def _ask(self, server: Server) -> list[Answer]:
        """All prompts, from an empty prefix cache."""
        answers = []
        for body in requests(self.prompts):
            server.flush()
            found = call(server.url + "/generate", body=body, timeout=ANSWER_SECONDS)
            answers += [Answer.of(answer) for answer in found]
        return answers

    def _log(self, label: str) -> Path:
        words = "".join(c if c.isalnum() else "-" for c in label)
        return self.record.folder / f"engine-{self.name}-{words}.log"


def state(server: Server) -> dict[str, Any]:
    """Live counters of rank 0."""
    found: dict[str, Any] = call(server.url + "/server_info")["internal_states"][0]["shift"]
    return found


def explained(error: Exception) -> str:
    """The sentence of an error, and the last line of the log that it quotes."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[-1][:300]}" if rest else first
