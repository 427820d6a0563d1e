"""Sends every workload to every contender in every round. An interrupted campaign keeps what it has."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from sglang_shift.errors import ShiftError
from sglang_shift.simulate.traffic import Request
from sglang_shift.tools.benchmark.client import Client, errors
from sglang_shift.tools.benchmark.contenders import Contender
from sglang_shift.tools.benchmark.link import Link, start_as_one_node, start_on
from sglang_shift.tools.benchmark.records import Visit, Visits
from sglang_shift.tools.benchmark.watch import Watch, change, counters
from sglang_shift.tools.benchmark.workloads import Plan, Workload
from sglang_shift.tools.servers import Failure, Server, call, start

SETTLE_S = 1.0


@dataclass(frozen=True)
class Settings:
    """The settings of a campaign.

    Attributes:
        out: The folder for all files of the campaign.
        rounds: Number of visits to each contender by each workload.
        flags: More flags for every server that the campaign starts.
        keep_all_servers: Whether all servers stay. Then idle servers are stopped (SIGSTOP), and every workload goes
            from contender to contender. If not, one server at a time gets all workloads of a round.
        link_rate: Bits per second of the emulated link. None means no link.
        vocabulary: Token ids of prompts are less than this number.
        model: Name of the model, for servers that have only OpenAI's API.
        timeout: Seconds that the start of a server may take, and seconds that a workload may take.
        port: The port of the servers; 0 takes any free port.
        facts: What else must be the same for visits to be comparable, such as the model.
    """

    out: Path
    rounds: int
    flags: Sequence[str]
    keep_all_servers: bool
    link_rate: float | None
    vocabulary: int
    model: str
    timeout: float
    port: int
    facts: dict[str, Any]


class Campaign:
    """Visits every contender with every workload, in every round.

    Args:
        plan: The workloads.
        contenders: The servers to visit. The saturated throughput of the first server is the unit of arrival rates.
        settings: The settings.

    Raises:
        ShiftError: the folder holds a campaign with other settings.
    """

    def __init__(self, plan: Plan, contenders: Sequence[Contender], settings: Settings) -> None:
        self.plan, self.contenders, self.settings = plan, contenders, settings
        self.visits = Visits(settings.out / "visits.jsonl")
        self._state = settings.out / "campaign.json"
        self._servers: dict[str, Server] = {}
        self._clients: dict[str, Client] = {}
        self._links: list[Link] = []
        self._done = {(v.contender, v.workload, v.round) for v in self.visits.read()}
        self.capacity = self._resume()

    def run(self) -> list[Visit]:
        """Make the visits that are missing, and return all visits.

        Raises:
            Failure: a server did not start or ended, or requests failed.
            ShiftError: the first contender answers no request, so there is no capacity.
        """
        if self._done:
            log_progress(f"resuming: {len(self._done)} visits are in {self.visits.path}")
        try:
            if self.capacity is None:
                self.capacity = self._measure_capacity()
                self._save()
            workloads = self.plan.workloads(self.capacity)
            tasks = [t for t in self._tasks(workloads) if (t[1].name, t[2].name, t[0]) not in self._done]
            with tqdm(total=sum(len(w.requests) for _, _, w in tasks), unit="request", smoothing=0.05) as bar:
                for number, contender, workload in tasks:
                    bar.set_description(f"round {number}/{self.settings.rounds}, {contender.name}, {workload.name}")
                    with self._serving(contender) as server:
                        self.visits.add([self._visit(server, contender, workload, number, bar)])
        finally:
            self.close()
        return self.visits.read()

    def close(self) -> None:
        """End all servers and links."""
        while self._servers:
            self._servers.popitem()[1].stop()
        while self._links:
            self._links.pop().close()

    def _tasks(self, workloads: Sequence[Workload]) -> Iterator[tuple[int, Contender, Workload]]:
        """Yield the visits. Their order rotates, so that a machine that is slow for a while favours no contender."""
        for number in range(1, self.settings.rounds + 1):
            if self.settings.keep_all_servers:
                for i, workload in enumerate(workloads):
                    for contender in _rotated(self.contenders, number - 1 + i):
                        yield number, contender, workload
            else:
                for contender in _rotated(self.contenders, number - 1):
                    for workload in workloads:
                        yield number, contender, workload

    @contextmanager
    def _serving(self, contender: Contender) -> Iterator[Server]:
        """Start or resume a contender's server for a ``with`` block."""
        name = contender.name
        if not self.settings.keep_all_servers and name not in self._servers:
            self.close()
        if contender.url is not None:
            server = Server([], contender.url, None)
            self._client(contender, server)
            yield server
            return
        if name in self._servers:
            server = self._servers[name]
            if self.settings.keep_all_servers:
                server.resume()
        else:
            server = self._start(contender)
        yield server
        if self.settings.keep_all_servers:
            server.pause()

    def _start(self, contender: Contender) -> Server:
        flags = [*contender.flags, "--enable-metrics", *self.settings.flags]
        log = self.settings.out / f"{contender.name.replace('/', '_').replace(':', '_')}.log"
        if self.settings.link_rate is not None and contender.ranks > 1:
            link = Link(contender.ranks, self.settings.link_rate)
            self._links.append(link)
            begin = start_as_one_node if contender.levels else start_on
            server = begin(link, flags, self.settings.port, log)
        else:
            server = start(flags, self.settings.port, log)
        self._servers[contender.name] = server
        server.wait_until_healthy(self.settings.timeout)
        if contender.busy_loop:
            server.lower_priority(contender.busy_loop)
        # What a server does for the first time takes longer. So this sends the most requests at once that it will see.
        client = self._client(contender, server)
        client.run(self.plan.saturated(), seed=-1)
        for level in (*contender.levels[1:], *contender.levels[:1]):
            self._change_level(server, level)
            client.run(self.plan.saturated(), seed=-1 - level)
        return server

    def _change_level(self, server: Server, level: int) -> None:
        """Let instances merge or split before the first visit, so that their first steps at each level do not count."""
        with suppress(OSError):  # a policy that changes them at the same time does as well
            call(server.url + "/shift/instances", {"level": level, "reason": "the warm-up of the benchmark"})

    def _client(self, contender: Contender, server: Server) -> Client:
        if contender.name not in self._clients or contender.url is None:
            s = self.settings
            api = "sglang" if contender.url is None or _has_generate(server.url) else "openai"
            self._clients[contender.name] = Client(server.url, api, s.model, s.vocabulary, s.timeout)
        return self._clients[contender.name]

    def _visit(self, server: Server, contender: Contender, workload: Workload, number: int, bar: Any) -> Visit:
        load_average = os.getloadavg()[0]
        first = workload.requests[0]
        client = self._clients[contender.name]
        client.run(Workload("warm-up", "warm-up", [Request(0.0, first.prompt, min(first.output, 8))]), seed=-number)
        self._empty_cache(server, contender)
        time.sleep(SETTLE_S)
        before, started = counters(server.url), datetime.now().isoformat(timespec="seconds")
        with Watch(server.url) as watch:
            records = client.run(workload, number, bar.update)
        for error in errors(records):
            server.check_alive(f"under load ({workload.name})", 5)
            log_progress(f"{contender.name}, {workload.name}: a request failed: {error}")
        if rejected := sum(r.rejected for r in records):
            log_progress(f"{contender.name}, {workload.name}: {rejected} requests were rejected")
        if all(r.failed for r in records):
            raise Failure(f"{contender.name}: no request of {workload.name} was answered", server.log)
        served = [r for r in records if not r.error]
        seconds = max(r.end for r in served) - min(r.sent for r in served) if served else 0.0
        return Visit(
            contender.name, workload.name, workload.kind, workload.x, number, seconds, records, watch.samples,
            change(before, counters(server.url)), started, load_average, workload.window, watch.instances.changes,
        )  # fmt: skip

    def _empty_cache(self, server: Server, contender: Contender) -> None:
        """Empty the prefix cache. Servers of other makers have no request for this.

        Raises:
            Failure: a server of this campaign did not empty it.
        """
        if contender.url is None:
            server.flush()
        elif self._clients[contender.name].native:
            with suppress(Failure):  # such a server may serve others, and refuses while it does
                server.flush()

    def _measure_capacity(self) -> float:
        """Measure prompt and output tokens per second of the first contender, when all requests come at once."""
        # The name is a part of the prompts' seed. Otherwise rounds would repeat these prompts.
        contender, workload = self.contenders[0], replace(self.plan.saturated(), name="capacity")
        log_progress(f"measuring the saturated throughput of {contender.name}: the unit of the arrival rates")
        with self._serving(contender) as server, tqdm(total=2 * len(workload.requests), unit="request") as bar:
            visits = [self._visit(server, contender, workload, n, bar) for n in (1, 2)]
        if not all(v.seconds for v in visits):
            raise ShiftError(
                f"{contender.name} answered no request of the saturated workload, so arrival rates have no unit; give "
                "shorter --prompt and --output, or name another contender first"
            )
        return fmean(sum(r.prompt + r.output for r in v.requests if not r.error) / v.seconds for v in visits)

    def _resume(self) -> float | None:
        """Return the capacity that an earlier run of the same campaign measured, or None if there was no such run."""
        if not self._state.exists():
            if self._done:
                raise ShiftError(f"{self.settings.out} holds visits, but not of what campaign; choose another --out")
            return None
        saved, facts = json.loads(self._state.read_text()), self._facts()
        if saved["facts"] != facts:
            differing = [name for name in facts if saved["facts"].get(name) != facts[name]]
            raise ShiftError(
                f"{self.settings.out} holds a campaign with other settings ({', '.join(differing)}); "
                "repeat that command to go on with it, or choose another --out"
            )
        return saved["capacity"]

    def _facts(self) -> dict[str, Any]:
        facts = {**self.settings.facts, "flags": list(self.settings.flags), "link_rate": self.settings.link_rate,
                 "first contender": self.contenders[0].name}  # fmt: skip
        return json.loads(json.dumps(facts, default=str))

    def _save(self) -> None:
        self.settings.out.mkdir(parents=True, exist_ok=True)
        self._state.write_text(json.dumps({"facts": self._facts(), "capacity": self.capacity}, indent=1) + "\n")


def _rotated(contenders: Sequence[Contender], by: int) -> list[Contender]:
    by %= len(contenders)
    return [*contenders[by:], *contenders[:by]]


def _has_generate(url: str) -> bool:
    """Return whether a server is SGLang. SGLang's own API takes token ids."""
    with suppress(OSError, ValueError):
        return "model_path" in call(url + "/get_model_info")
    return False


def log_progress(text: str) -> None:
    """Print a line of progress."""
    tqdm.write(f"benchmark: {text}", file=sys.stderr)
