"""This package adds Shift Parallelism (arXiv 2509.16495) to SGLang.

There are three ways in: ``python -m sglang_shift.launch_server``, ``sglang serve ... --sp-size S``, and
:class:`sglang_shift.Engine`. This module must stay light, because the processes that SGLang starts import it first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_shift.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from sglang_shift.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
