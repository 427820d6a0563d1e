"""``python -m sglang_shift.gpu_check``: the command of :mod:`sglang_shift.tools.gpu_check`."""

from __future__ import annotations

import sys

from sglang_shift.tools.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
