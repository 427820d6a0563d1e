"""Servers in tp, sp and shift, whose answers are held against those of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.tools.gpu_check.answers import Answer, compare, prompts, requests
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.servers import Server, call, start

REQUESTS = 16
"""At most at once: no decode step has more tokens, nor do CUDA graphs pad it to more."""

THRESHOLDS = {"tp": 10**9, "sp": 0, "shift": REQUESTS}
"""Of the policy ``tokens``: no step, every step, or prompts only are above it."""

EXPECTED = {
    "tp": {"decode": "tp", "prefill": "tp"},
    "sp": {"decode": "sp", "prefill": "sp"},
    "shift": {"decode": "tp", "prefill": "sp"},
}
"""In which modes steps then run, by phase."""

SHIFT = ["--enable-shift-parallel", "--shift-policy", "queue-depth"]
"""With ``tokens``, graphs of each size would be captured in one mode only. It is set later, for each comparison."""

START_SECONDS, ANSWER_SECONDS = 150, 120


@dataclass(frozen=True)
class Contender:
    """A server of a comparison.

    Attributes:
        label: Its name.
        flags: Besides those of all.
        variables: Of its environment, besides this process's.
        graphs: Whether its steps are to replay CUDA graphs, in both modes.
    """

    label: str
    flags: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    graphs: bool = False


class Comparison:
    """Servers of one model.

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

    def run(self, one_rank: Contender, others: Sequence[Contender], at_once: bool = False) -> None:
        """Compare every server with one rank's, which is SGLang as it is.

        What goes wrong with one of the others is a problem, not an exception.

        Args:
            one_rank: Whose answers are the reference.
            others: Started with :data:`SHIFT`.
            at_once: Start all of them now, as starting takes most of the time. Else a server ends before the next
                is started.

        Raises:
            ShiftError, OSError: the reference does not start, or does not answer.
        """
        contenders = [one_rank, *(replace(c, flags=[*c.flags, *SHIFT]) for c in others)]
        with ExitStack() as stack:
            servers = [stack.enter_context(self._serve(c)) for c in contenders if at_once]
            for i, contender in enumerate(contenders):
                with nullcontext(servers[i]) if at_once else self._serve(contender) as server:
                    (self.compare if i else self.take_reference)(contender, server)

    def take_reference(self, contender: Contender, server: Server) -> None:
        """The answers to hold others against.

        Raises:
            ShiftError, OSError: it does not start, or does not answer.
        """
        self._wait(contender, server)
        self.reference = ask(server, self.prompts)

    def compare(self, contender: Contender, server: Server) -> None:
        """Compare a server in every mode; what goes wrong is a problem."""
        try:
            self._wait(contender, server)
            for mode in EXPECTED:
                self._compare(contender, server, mode)
        except (ShiftError, OSError, ValueError) as error:
            self.record.problem(f"{contender.label}: {explain(error)}")

    def _compare(self, contender: Contender, server: Server, mode: str) -> None:
        set_threshold(server, THRESHOLDS[mode])
        before = state(server)
        found = compare(ask(server, self.prompts), self.reference, self.tolerance)
        now = state(server)
        steps = {name: count - before["steps"][name] for name, count in now["steps"].items()}
        self.record.row(
            server=contender.label,
            mode=mode,
            tokens=found.compared,
            ties=found.ties,
            worst_logprob_difference=found.worst,
            steps=steps,
            exchange=now["exchange"],
            graphs=now["graphs"],
        )
        label = f"{contender.label}, {mode}"
        self.record.note(
            f"{label}: {found.compared} tokens, {found.ties} ties, logprobs within {found.worst:.2g}; "
            f"steps {steps}; exchange {now['exchange']}"
        )
        for problem in found.problems:
            self.record.problem(f"{label}: {problem}")
        if {name for name, count in steps.items() if count} != set(EXPECTED[mode].values()):
            self.record.problem(f"{label}: the steps ran as {steps}")
        if contender.graphs:
            for problem in replay_problems(before["graphs"], now["graphs"], mode):
                self.record.problem(f"{label}: {problem}")

    def _wait(self, contender: Contender, server: Server) -> None:
        start = monotonic()
        server.wait_until_healthy(START_SECONDS)
        self.record.row(server=contender.label, waited_seconds=round(monotonic() - start, 1))

    @contextmanager
    def _serve(self, contender: Contender) -> Iterator[Server]:
        words = "".join(c if c.isalnum() else "-" for c in contender.label)
        log = self.record.folder / f"engine-{self.name}-{words}.log"
        server = start([*self.flags, *contender.flags], 0, log, environment=contender.variables)
        try:
            yield server
        finally:
            server.stop()


def ask(server: Server, asked: list[list[int]]) -> list[Answer]:
    """The answers to all prompts, from an empty prefix cache."""
    answers = []
    for body in requests(asked):
        server.flush()
        found = call(server.url + "/generate", body=body, timeout=ANSWER_SECONDS)
        answers += [Answer.of(answer) for answer in found]
    return answers


def set_threshold(server: Server, threshold: int) -> None:
    """From now on, steps of more than ``threshold`` tokens run in SP, others in TP."""
    wanted = {"shift_policy": "tokens", "shift_threshold": threshold}
    call(server.url + "/set_internal_state", body={"server_args": wanted})


def replay_problems(before: dict[str, Any], now: dict[str, Any], mode: str) -> list[str]:
    """What the counters of graphs say against it that steps replayed some: in each phase, in its mode.

    Args:
        before: ``graphs`` of :func:`state`, before the steps.
        now: After them.
        mode: Of :data:`EXPECTED`.
    """
    problems = []
    for phase, expected in EXPECTED[mode].items():
        if not now[phase][expected]["sizes"]:
            problems.append(f"there are no graphs of a {phase} in {expected}")
        elif now[phase][expected]["replayed"] == before[phase][expected]["replayed"]:
            problems.append(f"no {phase} replayed a graph in {expected}")
    return problems


def state(server: Server) -> dict[str, Any]:
    """Live counters of rank 0."""
    found: dict[str, Any] = call(server.url + "/server_info")["internal_states"][0]["shift"]
    return found


def explain(error: Exception) -> str:
    """The sentence of an error, and the last line of the log that it quotes."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[-1][:300]}" if rest else first
