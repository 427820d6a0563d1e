"""What a check finds: rows of figures, notes and problems, written line by line so that a crash keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


class Skip(Exception):
    """A check, or a part of it, cannot run here; the text says why."""


class Record:
    """A check's findings.

    Args:
        file: Where each line goes as well, as JSON; None for nowhere.
        folder: Where a check may leave logs.

    Attributes:
        rows: Figures.
        notes: What they say, for the table.
        problems: What is wrong; a check without any has passed.
    """

    def __init__(self, file: TextIO | None = None, folder: Path = Path()) -> None:
        self._file, self.folder = file, folder
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    def row(self, **figures: Any) -> Row:
        """Add a row of figures: JSON values by name."""
        self.rows.append(figures)
        self._write("row", figures)
        return figures

    def note(self, text: str) -> None:
        """Add a line of what the figures say."""
        self.notes.append(text)
        self._write("note", text)

    def problem(self, text: str) -> None:
        """Add something that is wrong. The check goes on, and has failed."""
        self.problems.append(text)
        self._write("problem", text)

    def end(self, status: str, reason: str = "") -> None:
        """The last line: ``passed``, ``failed`` or ``skipped``, and why."""
        self._write("end", {"status": status, "reason": reason})

    def _write(self, kind: str, value: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({kind: value}) + "\n")
            self._file.flush()


def read(path: Path) -> tuple[Record, dict[str, str] | None]:
    """What a check wrote, and its last line; None where it did not get there."""
    record, end = Record(), None
    kept: dict[str, list[Any]] = {"row": record.rows, "note": record.notes, "problem": record.problems}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            ((kind, value),) = json.loads(line).items()
        except ValueError:
            break  # a line that its end came in between
        if kind == "end":
            end = value
        else:
            kept[kind].append(value)
    return record, end
