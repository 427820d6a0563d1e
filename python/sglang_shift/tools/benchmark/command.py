"""``python -m sglang_shift.benchmark`` compares Shift Parallelism with its peers on this machine."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence

from sglang_shift.errors import ShiftError, print_error
from sglang_shift.tools.benchmark import environment, options, report
from sglang_shift.tools.benchmark.campaign import Campaign, Settings, log_progress
from sglang_shift.tools.benchmark.contenders import parse_contenders
from sglang_shift.tools.benchmark.figures import Limits
from sglang_shift.tools.benchmark.records import Visits

MODULE = "sglang_shift.benchmark"
HEADING, LINK = "heading.json", "link.json"
# The token that ends a sequence is a part of the context.
SPARE_TOKENS = 8


def measure(args: argparse.Namespace, model: str, command: str) -> None:
    """Run the campaign, or the rest of it. First write a file with the heading of its report.

    Raises:
        ShiftError: the campaign cannot start, or cannot go on.
    """
    model_facts = environment.describe_model(model)
    context = options.context_length(args.flags) or model_facts["context"]
    plan = options.plan(args, context - SPARE_TOKENS)
    contenders = parse_contenders(args.contenders, args.tp_size, args.sp_size, args.kv_tokens)
    rate, link_text = None, "none: ranks communicate through this machine's memory"
    if args.link or args.link_rate:
        rate, link_text = _link(args, model)
        log_progress(f"emulated link: {link_text}")
    flags = list(args.flags)
    flags += ["--model-path", model] if args.model_path else []
    flags += ["--dtype", args.dtype] if args.dtype else []
    facts = {"plan": repr(plan), "ranks": args.tp_size, "sp_size": args.sp_size, "kv_tokens": args.kv_tokens}
    settings = Settings(args.out, args.rounds, flags, args.together, rate, model_facts["vocabulary"],
                        args.model_path or "default", args.timeout, args.port, facts)  # fmt: skip
    campaign = Campaign(plan, contenders, settings)
    heading = {
        "command": command,
        "machine": environment.describe_machine(),
        "contenders": {c.name: c.url or shlex.join(c.flags) for c in contenders},
        "emulated link": link_text,
    }
    (args.out / HEADING).write_text(json.dumps(heading, indent=1) + "\n")
    campaign.run()


def _link(args: argparse.Namespace, model: str) -> tuple[float, str]:
    """Return the rate of the emulated link, and its description in a report.

    The rate depends on what the machine does during the measurement. So a campaign keeps its first rate.
    """
    from sglang_shift.tools.benchmark import link, link_rate

    link.check()
    if args.link_rate:
        return args.link_rate, f"{args.link_rate / 1e6:.0f} Mbit/s, as given"
    file = args.out / LINK
    if file.exists():
        kept = json.loads(file.read_text())
        if (kept["target"], kept.get("dtype")) == (args.link, args.dtype):
            return kept["rate"], kept["text"]
    choice = link_rate.choose_rate(model, args.tp_size, args.link, args.dtype)
    kept = {"target": args.link, "dtype": args.dtype, "rate": choice.rate, "text": choice.text}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    return choice.rate, choice.text


def main(argv: Sequence[str]) -> int:
    """Measure and report, and return the exit code."""
    args = options.parse(argv)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    limits = Limits(*(ms / 1e3 if ms is not None else None for ms in (args.slo_ttft, args.slo_tpot, args.slo_e2e)))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.report:
            from sglang_shift.models.demo import demo_model_path

            measure(args, args.model_path or demo_model_path(), shlex.join(["python", "-m", MODULE, *argv]))
        visits = Visits(args.out / "visits.jsonl").read()
        if not visits:
            raise ShiftError(f"--out {args.out} holds no visits; run without --report first")
        print(report.write(args.out, visits, json.loads((args.out / HEADING).read_text()), limits))
    except (ShiftError, ValueError, OSError) as error:
        return print_error(error, "benchmark")
    except KeyboardInterrupt:
        return 130
    return 0
