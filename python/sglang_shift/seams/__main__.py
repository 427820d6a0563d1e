"""``python -m sglang_shift.seams``: print ``digests.py`` for the installed SGLang, where a port begins."""

from __future__ import annotations

import inspect
from importlib.metadata import version

from sglang_shift.seams.registry import SEAMS, digest_of, resolve


def main() -> None:
    """Print the file."""
    print(f'"""Digests of the seams\' sources in sglang {version("sglang")}."""\n')
    print("# Printed by: python -m sglang_shift.seams")
    print("# ruff: noqa: E501")
    print("DIGESTS = {")
    for seam in SEAMS:
        if not inspect.isclass(target := resolve(seam.target)):
            print(f'    "{seam.target}": "{digest_of(target)}",')
    print("}")


if __name__ == "__main__":
    main()
