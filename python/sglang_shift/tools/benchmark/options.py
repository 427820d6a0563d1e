"""Defines the command line of ``python -m sglang_shift.benchmark``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.simulate.traces import read_azure, read_mooncake
from sglang_shift.simulate.traffic import Request, cut_window, scale
from sglang_shift.tools.benchmark.contenders import DEFAULT
from sglang_shift.tools.benchmark.records import MADE_UP, TRACES, USUAL
from sglang_shift.tools.benchmark.workloads import Plan, Sizes, Trace

# With these options one sees in about two minutes whether everything works.
SMOKE: dict[str, Any] = {
    "rounds": 1, "contenders": ["stock-tp", "shift:tokens"], "workloads": ["single", "saturated", "rate"],
    "prompt": (32, 128), "output": (4, 8), "lengths": (64,), "singles": 2, "single_output": 4, "saturated": 6,
    "rates": (0.5,), "rate_requests": 4,
}  # fmt: skip
FIELDS = tuple(Sizes.__dataclass_fields__)
LONGER_THAN_REPLICA = 1.2
"""The shortest of the long prompts, over what a replica holds."""


def parser() -> argparse.ArgumentParser:
    """Return a parser of all options, with their defaults."""
    p = argparse.ArgumentParser(
        prog="python -m sglang_shift.benchmark",
        description="Shift Parallelism beside its peers, on this machine: the same requests to each, interleaved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--contenders",
        nargs="+",
        default=list(DEFAULT),
        metavar="NAME",
        help="stock-tp, stock-dp, sarathi:TOKENS, tp, sp, shift, shift:POLICY, tbt:MS, instances:N, "
        "instances:N:POLICY, or NAME=URL of a server that runs; the first one's throughput is the unit of the arrival "
        "rates",
    )
    p.add_argument("--model-path", help="model to serve; the package's demo model if left out")
    p.add_argument("--tp-size", type=int, default=2, metavar="P", help="ranks, or replicas of stock-dp")
    p.add_argument("--sp-size", type=int, metavar="S", help="of sp and shift; P if left out")
    p.add_argument("--dtype", help="passed on to the servers")
    p.add_argument(
        "--kv-tokens",
        type=int,
        metavar="N",
        help="tokens of the KV pool; a replica of stock-dp gets 1/P, "
        "the same bytes; if left out, each server sizes its own",
    )
    p.add_argument("--rounds", type=int, default=3, help="visits to each contender by each workload")
    p.add_argument(
        "--together",
        action="store_true",
        help="start all servers once, stop those whose turn it is not (SIGSTOP), and go from one to the "
        "next with every workload: needs memory for all",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("benchmark/out"),
        metavar="DIR",
        help="folder for results, plots and logs; the same command goes on where it was interrupted",
    )
    p.add_argument("--port", type=int, default=0, help="port of the servers; 0: any that is free")
    p.add_argument(
        "--timeout",
        type=float,
        default=900,
        metavar="SECONDS",
        help="what a server may take to start, and a workload to be answered",
    )
    p.add_argument("--smoke", action="store_true", help="a quick try of everything; options given still count")
    p.add_argument("--report", action="store_true", help="measure nothing: tables and plots of what is in --out")
    _workloads(p.add_argument_group("workloads"))
    _link(p.add_argument_group("emulated link (root and iproute2 needed; docs/emulated-link.md)"))
    p.add_argument("flags", nargs="*", metavar="-- FLAG", help="more flags, for every server that is started")
    return p


def _workloads(group: argparse._ArgumentGroup) -> None:
    s = Sizes()
    group.add_argument(
        "--workloads",
        nargs="*",
        choices=MADE_UP,
        default=list(USUAL),
        metavar="KIND",
        help=f"of {', '.join(MADE_UP)}; traces are added by their files",
    )
    group.add_argument("--prompt", type=int, nargs=2, default=s.prompt, metavar=("FROM", "TO"), help="prompt tokens")
    group.add_argument("--output", type=int, nargs=2, default=s.output, metavar=("FROM", "TO"), help="output tokens")
    group.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=s.lengths,
        metavar="N",
        help="prompt lengths of single requests; those beyond the model's context are left out",
    )
    group.add_argument("--singles", type=int, default=s.singles, help="single requests of each length")
    group.add_argument("--single-output", type=int, default=s.single_output, help="output tokens of each")
    group.add_argument("--saturated", type=int, default=s.saturated, metavar="N", help="requests sent at once")
    group.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=s.rates,
        metavar="X",
        help="arrival rates, as shares of what the first contender does saturated",
    )
    group.add_argument("--rate-requests", type=int, default=s.rate_requests, help="requests at each rate")
    group.add_argument("--burst", type=int, default=s.burst, help="requests in a burst")
    group.add_argument("--bursts", type=int, default=s.bursts, help="how many bursts")
    group.add_argument(
        "--burst-stream",
        type=float,
        default=s.burst_stream,
        metavar="X",
        help="rate of the stream between bursts, as --rates",
    )
    group.add_argument(
        "--burst-every",
        type=float,
        default=s.burst_every,
        metavar="X",
        help="time from burst to burst, in units of what a burst alone takes",
    )
    group.add_argument("--long", type=int, default=s.long, help="prompt tokens of long-mix's long prompts")
    group.add_argument("--long-every", type=int, default=s.long_every, help="every so many requests one is long")
    group.add_argument("--mix-requests", type=int, default=s.mix_requests, help="requests of long-mix")
    group.add_argument("--mix-rate", type=float, default=s.mix_rate, metavar="X", help="its rate, as --rates")
    group.add_argument("--streams", type=int, default=s.streams, help="streams of long-prompts")
    group.add_argument("--stream-output", type=int, default=s.stream_output, help="output tokens of each stream")
    group.add_argument(
        "--arriving",
        type=int,
        nargs=2,
        default=s.arriving,
        metavar=("FROM", "TO"),
        help="their prompt tokens",
    )
    group.add_argument("--arriving-requests", type=int, default=s.arriving_requests, help="prompts beside the streams")
    group.add_argument("--arriving-rate", type=float, default=s.arriving_rate, metavar="X", help="rate, as --rates")
    _mixed(group)
    for kind, what in (("azure", "an Azure LLM inference trace (CSV)"), ("mooncake", "a Mooncake trace (JSONL)")):
        group.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"replay {what}")
        group.add_argument(
            f"--{kind}-window",
            type=float,
            nargs=2,
            default=(0.0, 60.0),
            metavar=("START", "SECONDS"),
            help="the part to replay",
        )
        group.add_argument(f"--{kind}-length", type=float, default=1.0, metavar="X", help="factor on its lengths")
    group.add_argument(
        "--trace-fit",
        type=float,
        metavar="X",
        help="scale the lengths of traces so that the longest request needs this share of --kv-tokens, instead",
    )
    group.add_argument(
        "--trace-load",
        type=float,
        default=0.8,
        metavar="X",
        help="arrivals are scaled so that their tokens come at this rate, as --rates",
    )
    group.add_argument("--trace-speed", type=float, metavar="X", help="arrivals come X times as fast, instead")
    for name, what in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "end-to-end time")):
        group.add_argument(
            f"--slo-{name}", type=float, metavar="MS", help=f"goodput counts requests of at most this {what}"
        )


def _mixed(group: argparse._ArgumentGroup) -> None:
    """Add the options of workloads whose longest requests fit no replica."""
    s = Sizes()
    group.add_argument("--clients", type=int, default=s.clients, help="requests in flight of closed-loop")
    group.add_argument("--closed-seconds", type=float, default=s.closed_seconds, metavar="S", help="how long it lasts")
    group.add_argument(
        "--long-shares",
        type=float,
        nargs="+",
        default=s.long_shares,
        metavar="X",
        help="shares of long requests of mixed-lengths, a workload for each; 0 for none",
    )
    group.add_argument(
        "--long-prompt",
        type=int,
        nargs=2,
        metavar=("FROM", "TO"),
        help="prompt tokens of these requests; if left out, from 1.2 times what a replica holds to half of --kv-tokens",
    )
    group.add_argument(
        "--long-need",
        type=int,
        metavar="N",
        help="tables tell requests of more tokens from the others; --kv-tokens / P if left out",
    )
    group.add_argument(
        "--mixed-rate",
        type=float,
        default=s.mixed_rate,
        metavar="X",
        help="rate of mixed-lengths, as --rates, for its short requests",
    )
    for name, default, what in (
        ("mixed-seconds", s.mixed_seconds, "how long requests of mixed-lengths arrive"),
        ("day-seconds", s.day_seconds, "how long requests of day arrive"),
        ("drain", s.drain, "how long both wait for answers after the last arrival"),
    ):
        group.add_argument(f"--{name}", type=float, default=default, metavar="S", help=what)
    for name, default, what in (
        ("day-idle", s.day_idle, "rate of day's idle part, as --rates"),
        ("day-peak", s.day_peak, "rate at the end of day's ramp, as --rates"),
        ("day-long-share", s.day_long_share, "share of long requests in day's ramp"),
    ):
        group.add_argument(f"--{name}", type=float, default=default, metavar="X", help=what)


def _link(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--link",
        metavar="TARGET",
        help="join the ranks by a link as slow, beside their computing, as "
        "that of a target: llama-70b or qwen-32b on 8 H200",
    )
    group.add_argument("--link-rate", type=float, metavar="BIT_PER_S", help="this rate instead of the derived one")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options. ``--smoke`` changes the defaults, and options that are given override the defaults."""
    p = parser()
    if p.parse_known_args(argv)[0].smoke:
        p.set_defaults(**SMOKE)
    args = p.parse_args(argv)
    counts = ("tp_size", "rounds", "singles", "saturated", "rate_requests", "burst", "bursts", "long_every",
              "mix_requests", "single_output", "long", "timeout", "azure_length", "mooncake_length", "trace_load",
              "mix_rate", "burst_stream", "burst_every", "kv_tokens", "sp_size", "trace_speed", "streams",
              "stream_output", "arriving_requests", "arriving_rate", "link_rate", "clients", "closed_seconds",
              "long_need", "mixed_rate", "mixed_seconds", "day_seconds", "day_idle", "day_peak",
              "trace_fit")  # fmt: skip
    for name in counts:
        if (value := getattr(args, name)) is not None and value <= 0:
            p.error(f"--{name.replace('_', '-')} {value:g} is not positive")
    for name in ("prompt", "output", "arriving"):
        if not 1 <= getattr(args, name)[0] <= getattr(args, name)[1]:
            p.error(f"--{name} takes two numbers, the first from 1 on and not above the second")
    if (args.link or args.link_rate) and args.kv_tokens is None:
        p.error("--link needs --kv-tokens: each rank is alone on its node and would take memory for itself alone")
    if min(*args.lengths, *args.rates) <= 0:
        p.error("--lengths and --rates must be positive")
    if not 0 <= min(*args.long_shares, args.day_long_share) <= max(*args.long_shares, args.day_long_share) < 1:
        p.error("--long-shares and --day-long-share are shares from 0 on and below 1")
    if args.drain < 0:
        p.error(f"--drain {args.drain:g} is negative")
    if args.trace_fit and args.kv_tokens is None:
        p.error("--trace-fit needs --kv-tokens, because it is a share of them")
    _set_long_requests(p, args)
    return args


def _set_long_requests(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set what follows from the size of the KV pools, if the user left it out: which requests are long ones."""
    if args.kv_tokens is not None:
        replica = args.kv_tokens // args.tp_size
        low = round(LONGER_THAN_REPLICA * replica)
        args.long_prompt = args.long_prompt or (low, max(low, args.kv_tokens // 2))
        args.long_need = args.long_need or replica
    if args.long_prompt is None:
        if {"mixed-lengths", "day"} & {*args.workloads}:
            p.error("mixed-lengths and day need --kv-tokens or --long-prompt, which say how long a long prompt is")
        args.long_prompt = Sizes.long_prompt
    if not 1 <= args.long_prompt[0] <= args.long_prompt[1]:
        p.error("--long-prompt takes two numbers, the first from 1 on and not above the second")


def context_length(flags: Sequence[str]) -> int | None:
    """Return the value of ``--context-length`` among a server's flags, or None.

    Raises:
        ShiftError: the value is no number.
    """
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    p.add_argument("--context-length", type=int)
    try:
        return p.parse_known_args(flags)[0].context_length
    except argparse.ArgumentError as error:
        raise ShiftError(f"{shlex.join(flags)}: {error}; give a number of tokens") from error


def plan(args: argparse.Namespace, context: int) -> Plan:
    """Return the workloads that the options ask for.

    Raises:
        ShiftError: a trace cannot be read, or has no request in its window.
    """
    changes = {name: _tuple(getattr(args, name)) for name in FIELDS}
    traces = {kind: _trace(kind, args) for kind in TRACES if getattr(args, kind)}
    return Plan([*args.workloads, *traces], replace(Sizes(), **changes), context, traces)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _trace(kind: str, args: argparse.Namespace) -> Trace:
    path, (start, seconds) = getattr(args, kind), getattr(args, f"{kind}_window")
    read = {"azure": read_azure, "mooncake": read_mooncake}[kind]
    try:
        requests: list[Request] = cut_window(read(path), start, seconds)
    except (OSError, ValueError) as error:
        raise ShiftError(f"--{kind} {path} cannot be read as such a trace: {error}") from error
    if not requests:
        raise ShiftError(f"--{kind}-window {start:g} {seconds:g}: no request of {path} arrives in that time")
    length = getattr(args, f"{kind}_length")
    if args.trace_fit:
        length = args.trace_fit * args.kv_tokens / max(r.prompt + r.output for r in requests)
    return Trace(kind, scale(requests, length=length), args.trace_load, args.trace_speed)
