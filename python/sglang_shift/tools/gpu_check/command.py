"""``python -m sglang_shift.gpu_check``: the checks, a table, and JSON.

Exit codes: 0, all that ran passed; 1, something failed; 2, nothing could run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sglang_shift.tools.gpu_check import environment, report
from sglang_shift.tools.gpu_check.checks import CHECKS
from sglang_shift.tools.gpu_check.runner import Outcome, run_all

MINUTES, MINUTES_OF_SEVERAL = 8.0, 20.0
"""For all checks on one GPU, and where there are more."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(prog="python -m sglang_shift.gpu_check", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=names, metavar="NAME", default=names, help=f"of {', '.join(names)}")
    add("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="for JSON and logs (%(default)s)")
    minutes = f"for all checks together ({MINUTES:g}; with several GPUs {MINUTES_OF_SEVERAL:g})"
    add("--minutes", type=float, help=minutes)
    add("--list", action="store_true", help="say what the checks are, and run none")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the checks; returns the exit code."""
    args = parse(argv)
    chosen = [check for check in CHECKS if check.name in args.only]
    if args.list:
        rows = [("name", "GPUs", "at most"), *((c.name, c.gpus, f"{c.limit:.0f} s") for c in chosen)]
        for text, check in zip(report.aligned(rows).splitlines(), (None, *chosen), strict=True):
            print(text + (f"  {check.text}" if check else ""))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    described = environment.describe()
    print("\n".join(f"{name}: {value}" for name, value in described.items()), end="\n\n", flush=True)
    outcomes: list[Outcome] = []
    report.write(args.out, described, outcomes)
    gpus = environment.gpus()
    minutes = (MINUTES_OF_SEVERAL if gpus > 1 else MINUTES) if args.minutes is None else args.minutes
    for outcome in run_all(chosen, gpus, environment.no_gpu(), 60 * minutes, args.out):
        outcomes.append(outcome)
        report.write(args.out, described, outcomes)
        print(report.line(outcome), flush=True)
    print(f"\n{report.totals(outcomes)}; {args.out / report.FILE}")
    return report.exit_code(outcomes)
