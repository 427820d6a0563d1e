"""An emulated link: each rank of a server in a network namespace of its own, joined by links of a set rate.

On one machine without GPUs, ranks communicate through its memory, at a cost that hardly shows beside
their computation's. Here they communicate over TCP at a rate that :mod:`link_rate` derives from GPUs'.
docs/emulated-link.md has a picture, and says what is emulated and what is not. Linux, root and
iproute2 are needed.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import TracebackType

from sglang_shift.errors import ShiftError
from sglang_shift.tools.servers import LAUNCHER, Server, claim_port, launch

PREFIX = "sglang-shift"
"""Of our namespaces' names: ``sglang-shift-PID-NUMBER-PLACE``, a place being a rank or ``switch``."""

DEVICE = "wire"
"""The shaped interface's name, in every rank's namespace."""

RENDEZVOUS_PORT = 20000
"""Free in a namespace that is new."""

# Both are of 198.18.0.0/15, which RFC 2544 sets aside for benchmarks. The ranks' network is seen in the
# namespaces only, so that every link can have the same one.
RANKS = IPv4Network("198.19.0.0/24")
MANAGEMENT = IPv4Network("198.18.0.0/16")

# A packet of this size is both what a message's time is rounded up to and what costs CPU time once.
MTU = 9000
ETHERNET_HEADER = 14
# How late a timer may fire, in seconds, before the link is slower than its rate.
TIMER = 100e-6
# More than TCP has under way: a queue that drops nothing, as on links that hold the sender back.
QUEUE_BYTES = 256 << 20

EXIT_SECONDS = 10.0

_numbers = itertools.count()


def check() -> None:
    """The emulated link must be possible here.

    Raises:
        ShiftError: says what it needs.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ShiftError(f"the emulated link needs `{missing[0]}`; install iproute2, or leave out --link")
    if os.geteuid() != 0:
        raise ShiftError("the emulated link needs root; run as root, or leave out --link")


def burst(rate: float) -> int:
    """Bytes that a link which was idle sends at once: a packet, and what passes while a timer is late.

    With fewer, the link is slower than its rate: what it could have sent by then is lost. With more, small
    messages pass as if there were no link.
    """
    return MTU + ETHERNET_HEADER + math.ceil(rate / 8 * TIMER)


class Link:
    """The namespaces and what joins them, from ``with`` to its end.

    Args:
        ranks: How many, 2 to 254.
        rate: What each rank sends, and what it receives, at most: bits per second. None: not limited.

    Raises:
        ShiftError: refused arguments, or no root, or no iproute2, or the kernel refuses.
    """

    def __init__(self, ranks: int, rate: float | None) -> None:
        check()
        if not 2 <= ranks <= RANKS.num_addresses - 2:
            raise ShiftError(f"an emulated link of {ranks} ranks; give 2 to {RANKS.num_addresses - 2}")
        if rate is not None and not 1e6 <= rate < 1e12:
            raise ShiftError(f"an emulated link of {rate:g} bit/s; give a rate between 1e6 and 1e12, or none")
        self.ranks = ranks
        self.rate = rate
        self._name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        remove(leftovers())
        self._host, self._server = self._management_addresses()
        atexit.register(self.close)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs in the namespaces and remove them; more than once does no harm."""
        remove(name for name in namespaces() if name.startswith(f"{self._name}-"))
        atexit.unregister(self.close)

    @property
    def server_address(self) -> str:
        """Rank 0's, over which its HTTP server is reached from outside; not limited in its rate."""
        return str(self._server)

    @property
    def rendezvous(self) -> str:
        """Rank 0's address and a port on the link, for ``--dist-init-addr``."""
        return f"{self.address(0)}:{RENDEZVOUS_PORT}"

    def address(self, rank: int) -> str:
        """A rank's, on the link."""
        return str(RANKS[rank + 1])

    def namespace(self, rank: int | str) -> str:
        """The name of a rank's network namespace, or of the ``switch``'s."""
        return f"{self._name}-{rank}"

    def command(self, rank: int, argv: Sequence[str]) -> list[str]:
        """``argv``, to be run as a rank. The process that is started becomes ``argv``: its pid is the rank's.

        /dev/shm is empty and its own, by which SGLang tells nodes apart: ranks that find one another's
        segments there would not use the link. ``ip netns exec`` makes the mount namespace for it.
        """
        mount = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.namespace(rank), "sh", "-c", mount, "sh", *argv]

    def environment(self, rank: int) -> dict[str, str]:
        """What a rank needs besides the environment that there is.

        Its address, because SGLang asks for a route to the Internet, which there is none of. Its cores,
        because it would take all of them, being alone on its node.
        """
        cores = sorted(os.sched_getaffinity(0))
        each = max(1, len(cores) // self.ranks)
        mine = [str(cores[(rank * each + i) % len(cores)]) for i in range(each)]
        return {
            "SGLANG_HOST_IP": self.address(rank),
            "GLOO_SOCKET_IFNAME": DEVICE,
            "OMP_NUM_THREADS": str(each),
            "SGLANG_CPU_OMP_THREADS_BIND": ",".join(mine),
        }

    def _management_addresses(self) -> tuple[IPv4Address, IPv4Address]:
        """The outside's and rank 0's: the first pair from a place of this process's own that is not in use."""
        used = set(re.findall(r"inet ([\d.]+)", _run("ip", "-4", "-oneline", "address")))
        pairs = MANAGEMENT.num_addresses // 2
        for i in range(pairs):
            first = MANAGEMENT[2 * ((os.getpid() + i) % pairs)]
            if str(first) not in used:
                return first, first + 1
        raise ShiftError(f"every address of {MANAGEMENT} is in use; leave out --link")

    def _build(self) -> None:
        switch = self.namespace("switch")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "mtu", str(MTU), "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for rank in range(self.ranks):
            self._add_rank(rank, switch)
        inside, outside = self.namespace(0), f"shift{os.getpid()}.{self._name.rsplit('-', 1)[1]}"
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "management", "netns", inside)
        _run("ip", "address", "add", f"{self._host}/31", "dev", outside)
        _run("ip", "-n", inside, "address", "add", f"{self._server}/31", "dev", "management")
        _run("ip", "-n", inside, "link", "set", "management", "up")
        _run("ip", "link", "set", outside, "up")

    def _add_rank(self, rank: int, switch: str) -> None:
        name, port = self.namespace(rank), f"port{rank}"
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", name, "link", "add", DEVICE, "mtu", str(MTU), "type", "veth",
             "peer", "name", port, "mtu", str(MTU), "netns", switch)  # fmt: skip
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", name, "address", "add", f"{self.address(rank)}/{RANKS.prefixlen}", "dev", DEVICE)
        _run("ip", "-n", name, "link", "set", DEVICE, "up")
        # Others pace what they send by what they measured, or take a wait in the queue for a full link.
        _run("ip", "netns", "exec", name, "sh", "-c", "echo reno >/proc/sys/net/ipv4/tcp_congestion_control")
        if self.rate is not None:
            for namespace, device in ((name, DEVICE), (switch, port)):
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{self.rate:.0f}bit",
                     "burst", str(burst(self.rate)), "limit", str(QUEUE_BYTES))  # fmt: skip


def namespaces() -> list[str]:
    """The names of those of all links on this machine."""
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def leftovers() -> list[str]:
    """Of these, those whose process is gone without having removed them."""
    return [name for name in namespaces() if not os.path.exists(f"/proc/{name.split('-')[2]}")]


def remove(names: Iterable[str]) -> None:
    """Kill what runs in the namespaces, and remove them. The kernel removes their interfaces a moment later."""
    for name in names:
        deadline = time.monotonic() + EXIT_SECONDS
        while (pids := _pids(name)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        with contextlib.suppress(ShiftError):  # another process may have been faster
            _run("ip", "netns", "delete", name)


def _pids(name: str) -> list[int]:
    with contextlib.suppress(ShiftError):
        return [int(pid) for pid in _run("ip", "netns", "pids", name).split()]
    return []


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise ShiftError(f"the emulated link cannot be set up: `{' '.join(argv)}` says: {reason}; leave out --link")
    return done.stdout


def start_on(link: Link, flags: Sequence[str], port: int, log: Path) -> Server:
    """Start ``sglang_shift.launch_server`` on a link: one process a rank, each of which counts as a node.

    Args:
        link: Joins the ranks.
        flags: As in :func:`~sglang_shift.tools.servers.start`.
        port: As there.
        log: As there.

    Raises:
        Failure: the port is in use.
    """
    port = claim_port(port)
    command = [*LAUNCHER, *flags, "--host", "0.0.0.0", "--port", str(port)]
    command += ["--nnodes", str(link.ranks), "--dist-init-addr", link.rendezvous]
    # A calibration over another link, or none, would look as if it were of this one.
    own = {"SGLANG_SHIFT_CACHE_DIR": str(log.parent.resolve() / "calibrations")}
    commands = [
        (link.command(rank, [*command, "--node-rank", str(rank)]), own | link.environment(rank))
        for rank in range(link.ranks)
    ]
    return launch(commands, f"http://{link.server_address}:{port}", log)
