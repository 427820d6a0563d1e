"""``python -m sglang_shift.porting`` runs the command of :mod:`sglang_shift.tools.porting`."""

from __future__ import annotations

import sys

from sglang_shift.tools.porting import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
