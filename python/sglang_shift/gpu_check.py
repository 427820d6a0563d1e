"""``python -m sglang_shift.gpu_check`` runs the command of :mod:`sglang_shift.tools.gpu_check`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if find_spec("pytest") is None:
        print("sglang_shift: error: the GPU checks need pytest: pip install 'sglang-shift[gpu-check]'", file=sys.stderr)
        sys.exit(2)
    from sglang_shift.tools.gpu_check.command import main

    sys.exit(main(sys.argv[1:]))
