"""``python -m sglang_shift.benchmark`` runs the command of :mod:`sglang_shift.tools.benchmark`."""

from __future__ import annotations

import sys

from sglang_shift.tools.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
