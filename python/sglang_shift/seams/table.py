"""Make two files from the declarations: ``digests.py``, and ``docs/seams.md`` with its tables."""

from __future__ import annotations

from importlib.metadata import version
from itertools import groupby

from sglang_shift.errors import SeamError
from sglang_shift.seams.check import source_of
from sglang_shift.seams.registry import Kind, Seam, seams

BEGIN, END = "<!-- python -m sglang_shift.seams writes from here -->\n", "<!-- to here -->\n"

HEADINGS = {
    Kind.REPLACES: "Replaced functions",
    Kind.SUBSTITUTES_FOR: "Classes with a substitute",
    Kind.OVERRIDES: "Overridden methods",
    Kind.RELIES_ON: "Code that stays, and that ours relies on",
    Kind.EXTENDS: "Extension points",
}


def digests() -> str:
    """The text of ``digests.py`` for the installed SGLang.

    Raises:
        SeamError: a declared target is not in this SGLang.
    """
    by_target = {seam.target: source_of(seam) for seam in seams() if seam.has_digest}
    return (
        '"""Digests of the seams\' sources in one release of SGLang."""\n\n'
        "# Written by: python -m sglang_shift.seams\n"
        "# ruff: noqa: E501\n"
        f'SGLANG_VERSION = "{version("sglang")}"\n'
        "DIGESTS = {\n" + "".join(f'    "{target}": "{by_target[target]}",\n' for target in sorted(by_target)) + "}\n"
    )


def document(text: str) -> str:
    """The text of ``docs/seams.md`` with the tables of today's declarations.

    Args:
        text: The text of the file. The function replaces the text between the two marks.

    Raises:
        SeamError: a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SeamError(f"docs/seams.md lacks the line {(BEGIN if not begin else END).strip()}; put it back")
    return before + begin + tables() + end + after


def tables() -> str:
    """A heading and a table for each kind of seam."""
    return "".join(_table(kind, list(group)) for kind, group in groupby(seams(), key=lambda seam: seam.kind))


def _table(kind: Kind, rows: list[Seam]) -> str:
    lines = [f"| `{seam.target}` | `{seam.place}` | {seam.why} |\n" for seam in rows]
    return f"\n## {HEADINGS[kind]}\n\n| SGLang's | Ours | Why |\n|---|---|---|\n" + "".join(lines) + "\n"
