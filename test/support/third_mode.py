"""Gives the family of modes a third member, as adding a line to ``sglang_shift/modes.py`` does: a plugin of pytest.

It must be loaded before anything else of the package, so it runs in a process of its own: ``pytest -p third_mode``.
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
