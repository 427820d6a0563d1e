"""The process of one check: ``python -m sglang_shift.tools.gpu_check.child module:function FILE``."""

from __future__ import annotations

import pkgutil
import signal
import sys
import traceback
from pathlib import Path

from sglang_shift.tools.gpu_check.record import Record, Skip


def main(target: str, path: str) -> None:
    """Run ``target``, a function of one :class:`Record`, and write what it finds to ``path``."""
    # What a check has started ends with it, by its own `finally`.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with open(path, "w") as file:
        record = Record(file, Path(path).parent)
        try:
            pkgutil.resolve_name(target)(record)
        except Skip as skip:
            record.end("skipped", str(skip))
        except Exception as error:  # whatever a library raises: this check has failed, the others go on
            traceback.print_exc()
            record.end("failed", one_line(error))
        else:
            record.end("failed" if record.problems else "passed", summed_up(record.problems))


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def summed_up(problems: list[str]) -> str:
    """The first problem, and how many there are besides."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more if problems else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
