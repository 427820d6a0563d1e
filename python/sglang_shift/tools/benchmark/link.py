"""Emulates a link. Each rank of a server has its own network namespace, and links of a given rate join the namespaces.

On one machine without GPUs, ranks communicate through its memory. This takes little time beside their computation. Here
they communicate over TCP, at a rate that :mod:`link_rate` derives from figures of GPUs. docs/emulated-link.md has a
picture, and says what is emulated and what is not. The link needs Linux, root and iproute2.
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
import sys
import time
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import TracebackType

from sglang_shift.errors import ShiftError
from sglang_shift.tools.servers import LAUNCHER, Server, claim_port, launch

PREFIX = "sglang-shift"
"""The first part of our namespaces' names: ``sglang-shift-PID-NUMBER-PLACE``. PLACE is a rank or ``switch``."""

DEVICE = "wire"
"""The name of the interface in every rank's namespace that limits the rate."""

NAMESPACES_VARIABLE = "SGLANG_SHIFT_LINK_NAMESPACES"
"""Environment variable with the namespace of each rank, with commas between them."""

LINKED_LAUNCHER = (sys.executable, "-m", "sglang_shift.tools.benchmark.linked_server")

RENDEZVOUS_PORT = 20000
"""A port that is free in a new namespace."""

# Both networks are parts of 198.18.0.0/15, which RFC 2544 reserves for benchmarks. The ranks' network is only visible
# in the namespaces, so every link can have the same network.
RANKS = IPv4Network("198.19.0.0/24")
MANAGEMENT = IPv4Network("198.18.0.0/16")

# The time of a message is rounded up to packets of this size, and each packet costs CPU time once.
MTU = 9000
ETHERNET_HEADER = 14
# If a timer fires later than this, in seconds, the link is slower than its rate.
TIMER_SECONDS = 100e-6
# TCP never has more bytes under way. So the queue drops nothing, as on links that make the sender wait.
QUEUE_BYTES = 256 << 20

EXIT_SECONDS = 10.0

_numbers = itertools.count()


def check() -> None:
    """Check that an emulated link is possible on this machine.

    Raises:
        ShiftError: something is missing. The message says what.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ShiftError(f"the emulated link needs `{missing[0]}`; install iproute2, or leave out --link")
    if os.geteuid() != 0:
        raise ShiftError("the emulated link needs root; run as root, or leave out --link")


def burst(rate: float) -> int:
    """Return the bytes that an idle link sends at once: a packet, and what passes while a timer is late.

    With fewer bytes the link is slower than its rate, because it cannot send later what it could have sent by then.
    With more bytes, small messages pass as if there were no link.
    """
    return MTU + ETHERNET_HEADER + math.ceil(rate / 8 * TIMER_SECONDS)


class Link:
    """The namespaces of the ranks and the links between them, until :meth:`close` or the end of a ``with`` block.

    Args:
        ranks: Number of ranks, 2 to 254.
        rate: The most bits per second that each rank sends, and the most that it receives. None means no limit.

    Raises:
        ShiftError: an argument is refused, root or iproute2 is missing, or the kernel refuses.
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
        """Kill all processes in the namespaces, and remove the namespaces. A second call does no harm."""
        remove(name for name in namespaces() if name.startswith(f"{self._name}-"))
        atexit.unregister(self.close)

    @property
    def server_address(self) -> str:
        """Rank 0's address for its HTTP server, which is reached from outside. Its rate is not limited."""
        return str(self._server)

    @property
    def rendezvous(self) -> str:
        """Rank 0's address and a port on the link, for ``--dist-init-addr``."""
        return f"{self.address(0)}:{RENDEZVOUS_PORT}"

    def address(self, rank: int) -> str:
        """Return a rank's address on the link."""
        return address_of(rank)

    def namespace(self, rank: int | str) -> str:
        """Return the name of the network namespace of a rank, or of the ``switch``."""
        return f"{self._name}-{rank}"

    def command(self, rank: int, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` as a rank. Its process becomes ``argv``, so its pid is the rank's pid.

        The rank has its own /dev/shm, which is empty. SGLang uses it to tell nodes apart: ranks that find one another's
        segments there would not use the link. ``ip netns exec`` makes the mount namespace for it.
        """
        mount = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.namespace(rank), "sh", "-c", mount, "sh", *argv]

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables that a rank needs besides the current environment.

        A rank needs its address, because SGLang looks for a route to the Internet, and there is no such route. It needs
        its cores, because it is alone on its node and would take all cores.
        """
        cores = sorted(os.sched_getaffinity(0))
        cores_per_rank = max(1, len(cores) // self.ranks)
        own_cores = [str(cores[(rank * cores_per_rank + i) % len(cores)]) for i in range(cores_per_rank)]
        return {
            "SGLANG_HOST_IP": self.address(rank),
            "GLOO_SOCKET_IFNAME": DEVICE,
            "OMP_NUM_THREADS": str(cores_per_rank),
            "SGLANG_CPU_OMP_THREADS_BIND": ",".join(own_cores),
        }

    def _management_addresses(self) -> tuple[IPv4Address, IPv4Address]:
        """Return the addresses of the outside and of rank 0: a pair that is not in use. The pid says where to begin."""
        taken_addresses = set(re.findall(r"inet ([\d.]+)", _run("ip", "-4", "-oneline", "address")))
        pairs = MANAGEMENT.num_addresses // 2
        for i in range(pairs):
            first = MANAGEMENT[2 * ((os.getpid() + i) % pairs)]
            if str(first) not in taken_addresses:
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
        # Other algorithms send at a pace that they measured, or take a wait in the queue for a full link.
        _run("ip", "netns", "exec", name, "sh", "-c", "echo reno >/proc/sys/net/ipv4/tcp_congestion_control")
        if self.rate is not None:
            for namespace, device in ((name, DEVICE), (switch, port)):
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{self.rate:.0f}bit",
                     "burst", str(burst(self.rate)), "limit", str(QUEUE_BYTES))  # fmt: skip


def address_of(rank: int) -> str:
    """Return the address that a rank has on every link."""
    return str(RANKS[rank + 1])


def namespaces() -> list[str]:
    """Return the names of the namespaces of all links on this machine."""
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def leftovers() -> list[str]:
    """Return the names of the namespaces whose process ended without removing them."""
    return [name for name in namespaces() if not os.path.exists(f"/proc/{name.split('-')[2]}")]


def remove(names: Iterable[str]) -> None:
    """Kill all processes in the namespaces, and remove the namespaces.

    The kernel removes their interfaces a moment later.
    """
    for name in names:
        deadline = time.monotonic() + EXIT_SECONDS
        while (pids := _pids(name)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        with contextlib.suppress(ShiftError):  # another process may have removed it before
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
    """Start ``sglang_shift.launch_server`` on a link. Each rank is a process and counts as a node.

    Args:
        link: The link that joins the ranks.
        flags: As in :func:`~sglang_shift.tools.servers.start`.
        port: As in :func:`~sglang_shift.tools.servers.start`.
        log: As in :func:`~sglang_shift.tools.servers.start`.

    Raises:
        Failure: the port is in use.
    """
    port = claim_port(port)
    command = [*LAUNCHER, *_flags(link, flags, port), "--nnodes", str(link.ranks)]
    variables = _variables(log)
    commands = [
        (link.command(rank, [*command, "--node-rank", str(rank)]), variables | link.environment(rank))
        for rank in range(link.ranks)
    ]
    return launch(commands, f"http://{link.server_address}:{port}", log)


def start_as_one_node(link: Link, flags: Sequence[str], port: int, log: Path) -> Server:
    """Start ``sglang_shift.launch_server`` on a link. All ranks are one node for SGLang, as instances need it.

    The launcher and rank 0 are in the namespace of rank 0. Every other rank goes to its own namespace when it starts
    (:mod:`sglang_shift.tools.benchmark.linked_server`). The ranks share ``/dev/shm`` and the sockets in the file
    system, on which the controller of instances sends requests. Between ranks, everything goes over the link.

    Args:
        link: The link that joins the ranks.
        flags: As in :func:`~sglang_shift.tools.servers.start`.
        port: As in :func:`~sglang_shift.tools.servers.start`.
        log: As in :func:`~sglang_shift.tools.servers.start`.

    Raises:
        Failure: the port is in use.
    """
    port = claim_port(port)
    command = [*LINKED_LAUNCHER, *_flags(link, flags, port)]
    variables = {
        NAMESPACES_VARIABLE: ",".join(link.namespace(rank) for rank in range(link.ranks)),
        "GLOO_SOCKET_IFNAME": DEVICE,
        "SGLANG_HOST_IP": link.address(0),
        "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "false",  # it would send objects through shared memory
    }
    return launch(
        [(link.command(0, command), _variables(log) | variables)], f"http://{link.server_address}:{port}", log
    )


def _flags(link: Link, flags: Sequence[str], port: int) -> list[str]:
    return [*flags, "--host", "0.0.0.0", "--port", str(port), "--dist-init-addr", link.rendezvous]


def _variables(log: Path) -> dict[str, str]:
    # A calibration over another link, or without a link, would look like a calibration over this link.
    return {"SGLANG_SHIFT_CACHE_DIR": str(log.parent.resolve() / "calibrations")}
