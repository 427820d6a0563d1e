"""Adds a third mode to the family of modes, as a new line in ``sglang_shift/modes.py`` would. It is a pytest plugin.

It must be loaded before anything else of the package. So it runs in its own process: ``pytest -p third_mode``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import sglang_shift

NAME, LAST = "sglang_shift.modes", '    SP = "sp"\n'

assert NAME not in sys.modules, "the package has its modes already"
spec = importlib.util.find_spec(NAME)
source = Path(spec.origin).read_text()
assert source.count(LAST) == 1
module = sys.modules[NAME] = sglang_shift.modes = importlib.util.module_from_spec(spec)
exec(compile(source.replace(LAST, f'{LAST}    THIRD = "third"\n'), spec.origin, "exec"), vars(module))
