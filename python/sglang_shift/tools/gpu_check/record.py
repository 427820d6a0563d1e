"""Stores what a check finds: rows of figures, notes and problems.

Each finding is written as a line at once, so that it survives a crash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

Row = dict[str, Any]
Status = Literal["passed", "failed", "skipped"]


class End(msgspec.Struct, omit_defaults=True):
    """How a check ended.

    Attributes:
        status: The result of the check.
        reason: Why the check failed or was skipped.
        late: Whether the check failed because its time was up.
    """

    status: Status
    reason: str = ""
    late: bool = False


class Line(msgspec.Struct, omit_defaults=True):
    """One line of the file. Exactly one field is set."""

    row: Row | None = None
    note: str | None = None
    problem: str | None = None
    end: End | None = None


class Record:
    """The findings of a check.

    Args:
        file: The file to which each finding is also written as a JSON line; None writes to no file.
        folder: The folder for the logs of a check.

    Attributes:
        rows: The figures.
        notes: Lines for the table that say what the figures mean.
        problems: What is wrong. A check without problems has passed.
    """

    def __init__(self, file: BinaryIO | None = None, folder: Path = Path()) -> None:
        self._file, self.folder = file, folder
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    def row(self, **figures: Any) -> Row:
        """Add a row of figures: JSON values by name."""
        self.rows.append(figures)
        self._write(Line(row=figures))
        return figures

    def note(self, text: str) -> None:
        """Add a line that says what the figures mean."""
        self.notes.append(text)
        self._write(Line(note=text))

    def problem(self, text: str) -> None:
        """Add a problem. The check goes on, but it has failed."""
        self.problems.append(text)
        self._write(Line(problem=text))

    def end(self, end: End) -> None:
        """Write the last line, which says how the check ended."""
        self._write(Line(end=end))

    def _write(self, line: Line) -> None:
        if self._file is not None:
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()


def read(path: Path) -> tuple[Record, End | None]:
    """Return what a check wrote and how it ended.

    The end is None if the check wrote no end. If the check wrote two ends, the first one counts.
    """
    record, end = Record(), None
    decoder = msgspec.json.Decoder(Line)
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError:
            break  # the process ended while it wrote this line
        record.rows += [] if line.row is None else [line.row]
        record.notes += [] if line.note is None else [line.note]
        record.problems += [] if line.problem is None else [line.problem]
        end = end or line.end
    return record, end


def one_line(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
