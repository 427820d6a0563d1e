"""``python -m sglang_shift.plan`` runs the command of :mod:`sglang_shift.tools.plan`."""

from __future__ import annotations

import sys

from sglang_shift.tools.plan.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
