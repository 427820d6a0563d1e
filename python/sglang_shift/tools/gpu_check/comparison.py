"""Compares the answers of servers in tp, sp and shift with the answers of one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from sglang_shift.cost.model import PHASES
from sglang_shift.errors import ShiftError
from sglang_shift.tools.gpu_check.answers import Answer, compare, make_prompts, requests
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.servers import Server, call, start

REQUESTS = 16
"""The most requests at once. No decode step has more tokens, and no CUDA graph pads a decode step to more."""

THRESHOLDS = {"tp": 10**9, "sp": 0, "shift": REQUESTS}
"""Thresholds of the policy ``tokens``. No step, every step, or only prompts are above the threshold."""

EXPECTED = {
    "tp": {"decode": "tp", "prefill": "tp"},
    "sp": {"decode": "sp", "prefill": "sp"},
    "shift": {"decode": "tp", "prefill": "sp"},
}
"""The mode in which steps run with each threshold, by phase."""

SHIFT = ["--enable-shift-parallel", "--shift-policy", "queue-depth"]
"""Flags of all servers except the reference.

With the policy ``tokens``, the graphs of each size would be captured in one mode only. So this policy is set later,
before each comparison.
"""

START_SECONDS, ANSWER_SECONDS = 420, 300
"""The most seconds for a start and for answers. In a new environment, SGLang and FlashInfer compile kernels in both."""


@dataclass(frozen=True)
class ServerSetup:
    """A server of a comparison.

    Attributes:
        label: Its name.
        flags: Its own flags, which are added to the flags of all servers.
        variables: Its own environment variables, which are added to the variables of this process.
        graphs: The phases whose steps must replay CUDA graphs, in both modes.
    """

    label: str
    flags: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    graphs: Sequence[str] = ()

    @property
    def pipelined(self) -> bool:
        """Whether prefills in SP must exchange their heads group by group."""
        return "--shift-exchange-pipeline" in self.flags


class ServerComparison:
    """A comparison of servers of one model.

    Args:
        record: The record for differences and figures. The servers' logs go into its folder.
        name: A part of the names of these logs.
        flags: The flags of every server.
        vocabulary: The size of the model's vocabulary, for prompts.
        tolerance: The largest difference between two logprobs that rounding explains.
    """

    def __init__(self, record: Record, name: str, flags: list[str], vocabulary: int, tolerance: float) -> None:
        self.record, self.name, self.flags, self.tolerance = record, name, flags, tolerance
        self.prompts = make_prompts(vocabulary)
        self.reference: list[Answer] = []

    def run(self, one_rank: ServerSetup, others: Sequence[ServerSetup], at_once: bool = False) -> None:
        """Compare every server with a server of one rank, which is stock SGLang.

        If another server fails, this is recorded as a problem and raises no exception.

        Args:
            one_rank: The server whose answers are the reference.
            others: The other servers. They are started with :data:`SHIFT`.
            at_once: Whether to start all servers at the same time, because the start takes most of the time. If not,
                each server ends before the next one starts.

        Raises:
            ShiftError, OSError: the reference does not start, or does not answer.
        """
        setups = [one_rank, *(replace(c, flags=[*c.flags, *SHIFT]) for c in others)]
        with ExitStack() as stack:
            servers = [stack.enter_context(self._serve(c)) for c in setups if at_once]
            for i, setup in enumerate(setups):
                with nullcontext(servers[i]) if at_once else self._serve(setup) as server:
                    (self.compare if i else self.take_reference)(setup, server)

    def take_reference(self, setup: ServerSetup, server: Server) -> None:
        """Store the answers of a server as the reference.

        Raises:
            ShiftError, OSError: the server does not start, or does not answer.
        """
        self._wait(setup, server)
        self.reference = ask(server, self.prompts)

    def compare(self, setup: ServerSetup, server: Server) -> None:
        """Compare a server in every mode. A failure of the server is recorded as a problem."""
        try:
            self._wait(setup, server)
            for mode in EXPECTED:
                self._compare(setup, server, mode)
        except (ShiftError, OSError, ValueError) as error:
            self.record.problem(f"{setup.label}: {explain(error)}")

    def _compare(self, setup: ServerSetup, server: Server, mode: str) -> None:
        set_threshold(server, THRESHOLDS[mode])
        before = state(server)
        answers = ask(server, self.prompts)
        difference = compare(answers, self.reference, self.tolerance)
        after = state(server)
        steps = {name: count - before["steps"][name] for name, count in after["steps"].items()}
        self.record.row(
            server=setup.label,
            mode=mode,
            tokens=difference.compared,
            ties=difference.ties,
            worst_logprob_difference=difference.worst,
            steps=steps,
            exchange=after["exchange"],
            graphs=after["graphs"],
        )
        label = f"{setup.label}, {mode}"
        self.record.note(
            f"{label}: {difference.compared} tokens, {difference.ties} ties, logprobs within {difference.worst:.2g}; "
            f"steps {steps}; exchange {after['exchange']}"
        )
        for problem in [*difference.problems, *mode_problems(answers, self.prompts, mode)]:
            self.record.problem(f"{label}: {problem}")
        if {name for name, count in steps.items() if count} != set(EXPECTED[mode].values()):
            self.record.problem(f"{label}: the steps ran as {steps}")
        if setup.pipelined and not pipelined_as_expected(before, after, mode):
            self.record.problem(f"{label}: {after['exchange_pipeline']} says which steps exchanged group by group")
        for problem in replay_problems(before["graphs"], after["graphs"], mode, setup.graphs):
            self.record.problem(f"{label}: {problem}")

    def _wait(self, setup: ServerSetup, server: Server) -> None:
        start = monotonic()
        server.wait_until_healthy(START_SECONDS)
        self.record.row(server=setup.label, waited_seconds=round(monotonic() - start, 1))

    @contextmanager
    def _serve(self, setup: ServerSetup) -> Iterator[Server]:
        words = "".join(c if c.isalnum() else "-" for c in setup.label)
        log = self.record.folder / f"engine-{self.name}-{words}.log"
        server = start([*self.flags, *setup.flags], 0, log, environment=setup.variables)
        try:
            yield server
        finally:
            server.stop()


def ask(server: Server, prompts: list[list[int]]) -> list[Answer]:
    """Return the answers to all prompts. The prefix cache is emptied before each request."""
    answers = []
    for body in requests(prompts):
        server.flush()
        bodies = call(server.url + "/generate", body=body, timeout=ANSWER_SECONDS)
        answers += [Answer.of(answer) for answer in bodies]
    return answers


def set_threshold(server: Server, threshold: int) -> None:
    """Let steps of more than ``threshold`` tokens run in SP from now on, and all other steps in TP."""
    settings = {"shift_policy": "tokens", "shift_threshold": threshold}
    call(server.url + "/set_internal_state", body={"server_args": settings})


def mode_problems(answers: list[Answer], prompts: list[list[int]], mode: str) -> list[str]:
    """Find answers whose steps ran in other modes than expected.

    A request decodes each token but the first, and all its other steps are prefills. A prompt of more than
    :data:`REQUESTS` tokens has a step above the threshold of ``shift``.

    Args:
        answers: The answers of :func:`ask`.
        prompts: The prompts that were asked.
        mode: A key of :data:`EXPECTED`.
    """
    problems = []
    for i, answer in enumerate(answers):
        least = Counter({EXPECTED[mode]["decode"]: len(answer.tokens) - 1})
        least[EXPECTED[mode]["prefill"]] += len(prompts[i % len(prompts)]) > REQUESTS
        if any(answer.steps.get(name, 0) < count for name, count in least.items()):
            problems.append(f"answer {i} took the steps {answer.steps}, and at least {dict(least)} were expected")
    return problems


def replay_problems(
    before: dict[str, Any], after: dict[str, Any], mode: str, phases: Sequence[str] = PHASES
) -> list[str]:
    """Find the phases in which no step replayed a graph of the expected mode.

    Args:
        before: The counters ``graphs`` of :func:`state` before the steps.
        after: The same counters after the steps.
        mode: A key of :data:`EXPECTED`.
        phases: The phases to look at.
    """
    problems = []
    for phase, expected in EXPECTED[mode].items():
        if phase not in phases:
            continue
        if not after[phase][expected]["sizes"]:
            problems.append(f"there are no graphs of a {phase} in {expected}")
        elif after[phase][expected]["replayed"] == before[phase][expected]["replayed"]:
            problems.append(f"no {phase} replayed a graph in {expected}")
    return problems


def pipelined_as_expected(before: dict[str, Any], after: dict[str, Any], mode: str) -> bool:
    """Whether prefills in SP, and no others, exchanged their heads group by group between two :func:`state`."""
    steps = after["exchange_pipeline"]["steps"] - before["exchange_pipeline"]["steps"]
    return (steps > 0) is (EXPECTED[mode]["prefill"] == "sp")


def state(server: Server) -> dict[str, Any]:
    """Return the live counters of rank 0."""
    counters: dict[str, Any] = call(server.url + "/server_info")["internal_states"][0]["shift"]
    return counters


def explain(error: Exception) -> str:
    """Return the sentence of an error, and the last line of the log that the error quotes."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[-1][:300]}" if rest else first
