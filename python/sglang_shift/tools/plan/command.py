"""``python -m sglang_shift.plan``: plan how to serve a model on GPUs that are not there, or check the cost model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_shift.errors import ShiftError, print_error
from sglang_shift.flags import AUTO
from sglang_shift.models.sizes import REPLICATED, SHARDED
from sglang_shift.simulate.traces import MAX_TOKENS, read_trace
from sglang_shift.simulate.traffic import Lengths, Request, cut_window, scale, steady
from sglang_shift.tools.plan import gaps, motivation, paper, report
from sglang_shift.tools.plan.hardware import NODE, gpus, parse_gpus
from sglang_shift.tools.plan.model import Model, read_model
from sglang_shift.tools.plan.search import search

MODULE = "sglang_shift.plan"
WINDOW = 900.0
"""Seconds of a trace to use by default. The Shift Parallelism paper replays a part of this length."""

MIN_RATE, MAX_RATE = 1e-6, 1e6
"""Bounds of rates and paces. With smaller or larger values, the simulator's clock would lose its milliseconds."""

MOST_REQUESTS = 10**6


def words_of(value: Lengths) -> str:
    """Return lengths in words."""
    return f"{value[0]} to {value[1]}" if isinstance(value, tuple) else str(value)


def lengths(text: str) -> Lengths:
    """Parse ``N`` or ``LOW-HIGH`` of the command line.

    Raises:
        ValueError: the text is something else.
    """
    low, *rest = (int(part) for part in text.split("-"))
    high = rest[0] if rest else low
    if len(rest) > 1 or not 1 <= low <= high <= MAX_TOKENS:
        raise ValueError(text)
    return (low, high) if rest else low


def factor(text: str) -> float:
    """Parse a rate, a pace or milliseconds of the command line.

    Raises:
        argparse.ArgumentTypeError: the text is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not MIN_RATE <= value <= MAX_RATE:
        raise argparse.ArgumentTypeError(f"'{text}' must be more than 0, a number from {MIN_RATE:g} to {MAX_RATE:g}")
    return value


def request_count(text: str) -> int:
    """Parse a number of requests of the command line.

    Raises:
        argparse.ArgumentTypeError: the text is something else.
    """
    return _whole(text, 1, MOST_REQUESTS)


def context_length(text: str) -> int:
    """Parse the tokens of a context of the command line. The context must have room for a prompt and an output.

    Raises:
        argparse.ArgumentTypeError: the text is something else.
    """
    return _whole(text, 2, MAX_TOKENS)


def dcp_size(text: str) -> int | str:
    """Parse the value of ``--dcp-size`` of the command line.

    Raises:
        argparse.ArgumentTypeError: the text is neither a number of GPUs nor ``auto``.
    """
    return AUTO if text == AUTO else _whole(text, 1, NODE)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least} to {most}")
    return value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    add = parser.add_argument
    add(
        "--check",
        action="store_true",
        help="predict the Shift Parallelism paper's table, and say how far off it is; "
        "with --tbt-target: compare bounds on the gap between tokens for its Llama-70B, with long prompts",
    )
    add(
        "--check-instances",
        action="store_true",
        help="predict the table by which the paper Gyges motivates instances, beside the table itself",
    )
    add("--model", type=Path, metavar="PATH", help="a config.json, or the folder that has one")
    add("--gpus", metavar="NxKIND", help=f"for example 8xH200; kinds: {', '.join(gpus())}")
    add("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="auto is bfloat16")
    add("--dcp-size", type=dcp_size, default=1, metavar="D|auto", help="GPUs that divide a request's KV cache by token")
    add("--context-length", type=context_length, metavar="N", help="the longest sequence, if not the model's own")
    add("--experts", choices=(SHARDED, REPLICATED), default=SHARDED, help="what a rank has of the experts for SP")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help="Azure's (.csv) or Mooncake's (.jsonl)")
    source.add_argument("--rate", type=factor, metavar="R", help="made-up traffic instead: requests per second")
    add("--window", type=float, nargs=2, default=(0.0, WINDOW), metavar=("START", "SECONDS"), help="of the trace")
    add("--pace", type=factor, default=1.0, metavar="F", help="the trace's requests come F times as fast")
    add("--prompt", type=lengths, default=4096, metavar="N|LOW-HIGH", help="made-up prompts' tokens (%(default)s)")
    add("--output", type=lengths, default=250, metavar="N|LOW-HIGH", help="their outputs' tokens (%(default)s)")
    add("--requests", type=request_count, default=1000, help="made-up ones (%(default)s)")
    add("--tbt-target", type=factor, metavar="MS", help="also compare ways to bound the gap between tokens")
    add("--plot", type=Path, metavar="FILE.png", help="also draw latency against throughput")
    args = parser.parse_args(argv)
    if not (args.check or args.check_instances) and not (args.model and args.gpus and (args.trace or args.rate)):
        parser.error("give --model, --gpus and one of --trace and --rate; or --check")
    start, seconds = args.window
    if not (math.isfinite(start) and seconds > 0):
        parser.error(f"--window takes a second to start at and more than 0 seconds, not {start:g} {seconds:g}")
    return args


def requests_of(args: argparse.Namespace, model: Model) -> tuple[list[Request], str]:
    """Return the traffic, and its description in words.

    Raises:
        ShiftError: the trace cannot be read, or has no request in the window.
    """
    if args.rate:
        requests = steady(args.rate, prompt=args.prompt, output=args.output, requests=args.requests)
        words = (
            f"{len(requests)} requests at {args.rate:g}/s, prompts of {words_of(args.prompt)} tokens and outputs of "
        )
        return cut_to_context(requests, words + words_of(args.output), model)
    start, seconds = args.window
    try:
        requests = cut_window(read_trace(args.trace), start, seconds)
    except (OSError, ValueError) as error:
        raise ShiftError(
            f"--trace {args.trace} cannot be read: {error}; give a .csv of Azure's or a .jsonl of Mooncake's"
        ) from error
    if not requests:
        raise ShiftError(f"--trace {args.trace} has no request from second {start:g} to {start + seconds:g}")
    words = f"{len(requests)} requests of {args.trace.name}, second {start:g} to {start + seconds:g}"
    words += f", {args.pace:g} times as fast" if args.pace != 1 else ""
    return cut_to_context(scale(requests, time=1 / args.pace), words, model)


def cut_to_context(requests: list[Request], words: str, model: Model) -> tuple[list[Request], str]:
    """Cut requests to the model's context. If some requests were cut, the words say how many."""
    cut_requests = scale(requests, context=model.context)
    cut = sum(r != original for r, original in zip(cut_requests, requests, strict=True))
    return cut_requests, f"{words}; {cut} of them cut to the context of {model.context} tokens" if cut else words


def progress(words: str) -> None:
    """Say on standard error what is tried next."""
    print(words, file=sys.stderr, flush=True)


def print_plan(args: argparse.Namespace) -> None:
    """Print the plan that the arguments ask for, as Markdown. Draw it if the arguments ask for that.

    Raises:
        ShiftError: there is no plan, or the picture cannot be made.
    """
    if args.plot:
        report.check_plot(args.plot)
    count, gpu = parse_gpus(args.gpus)
    model = read_model(args.model, args.context_length, args.experts)
    requests, traffic = requests_of(args, model)
    kv_dtype = "fp8" if args.kv_cache_dtype == "fp8" else "bfloat16"
    plan = search(model, gpu, count, requests, kv_dtype, progress, args.dcp_size)
    where = f"{count} x {gpu.name}"
    print(report.text(plan, model, where, traffic), flush=True)
    if args.tbt_target:
        print(gaps.section(plan.best, requests, args.tbt_target / 1e3, progress), flush=True)
    if args.plot:
        report.plot(plan, f"{model.name} on {where}", args.plot)


def main(argv: Sequence[str]) -> int:
    """Print a plan or the check. Return 0, or 2 if the arguments are refused."""
    args = parse(argv)
    try:
        if args.check and args.tbt_target:
            print(gaps.study(paper.MODELS["Llama-70B"], args.tbt_target / 1e3, progress))
        elif args.check:
            print(paper.report())
        elif args.check_instances:
            print(motivation.report())
        else:
            print_plan(args)
    except ShiftError as error:
        return print_error(error)
    return 0
