"""``python -m sglang_shift.status`` runs the command of :mod:`sglang_shift.tools.status`."""

from __future__ import annotations

import sys

from sglang_shift.tools.status import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
