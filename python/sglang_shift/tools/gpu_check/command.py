"""``python -m sglang_shift.gpu_check``: run the GPU checks, print a table and write JSON.

The exit code is 0 if all checks that ran passed, 1 if a check failed, and 2 if no check could run. Other codes are
pytest's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

from sglang_shift.tools.gpu_check import checks, environment, report
from sglang_shift.tools.gpu_check.catalogue import Check, checks_of
from sglang_shift.tools.gpu_check.isolation import SESSION, Isolation
from sglang_shift.tools.tables import text_table

MODULE = checks
"""The module whose test functions are the checks."""

MINUTES, MINUTES_OF_SEVERAL = 20.0, 30.0
"""The time limit for all checks together: with one GPU, and with several GPUs."""

JUNIT = "gpu_check.xml"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    names = [check.name for check in checks_of(MODULE)]
    parser = argparse.ArgumentParser(prog="python -m sglang_shift.gpu_check", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=names, metavar="NAME", default=names, help=f"of {', '.join(names)}")
    add("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="for JSON, XML and logs (%(default)s)")
    minutes = f"for all checks together ({MINUTES:g}; with several GPUs {MINUTES_OF_SEVERAL:g})"
    add("--minutes", type=float, help=minutes)
    add("--list", action="store_true", help="say what the checks are, and run none")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the checks and return the exit code."""
    args = parse(argv)
    chosen = [check for check in checks_of(MODULE) if check.name in args.only]
    if args.list:
        print(listing(chosen))
        return report.PASSED
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment.describe()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n", flush=True)
    gpus = environment.gpus()
    minutes = (MINUTES_OF_SEVERAL if gpus > 1 else MINUTES) if args.minutes is None else args.minutes
    reporter = report.Reporter(args.out, facts)
    code = run(chosen, Isolation(gpus, environment.no_gpu(), 60 * minutes, args.out), reporter, args.out / JUNIT)
    print(f"\n{report.totals(reporter.results)}; {args.out / report.FILE}")
    return code


def listing(chosen: Sequence[Check]) -> str:
    """Return a line for each check, which says what the check needs and what it shows."""
    rows = [("name", "GPUs", "at most"), *((c.name, c.gpus, f"{c.limit:.0f} s") for c in chosen)]
    texts = ("", *(f"  {check.text}" for check in chosen))
    return "\n".join(row + text for row, text in zip(text_table(rows).splitlines(), texts, strict=True))


def run(chosen: Sequence[Check], isolation: Isolation, reporter: report.Reporter, junit: Path) -> int:
    """Let pytest run the checks and write ``junit``, and return the exit code."""
    file = Path(str(MODULE.__file__))
    # pytest-timeout is off in this process. It limits a check in the check's own process.
    options = ["-p", "no:terminal", "-p", "no:timeout", f"--junitxml={junit}", f"--rootdir={file.parent}"]
    tests = [f"{file}::{check.function}" for check in chosen]
    code = pytest.main([*SESSION, *options, *tests], plugins=[isolation, reporter])
    ended = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return report.exit_code(reporter.results) if ended else int(code)
