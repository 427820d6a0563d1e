"""What a check finds: rows of figures, notes and problems, written line by line so that a crash keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

Row = dict[str, Any]
Status = Literal["passed", "failed", "skipped"]


class End(msgspec.Struct, omit_defaults=True):
    """How a check ended.

    Attributes:
        status: Its result.
        reason: Why it failed or was skipped.
        late: Whether it failed because its time was up.
    """

    status: Status
    reason: str = ""
    late: bool = False


class Line(msgspec.Struct, omit_defaults=True):
    """One line of the file: it has one of these."""

    row: Row | None = None
    note: str | None = None
    problem: str | None = None
    end: End | None = None


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
        """Add a line of what the figures say."""
        self.notes.append(text)
        self._write(Line(note=text))

    def problem(self, text: str) -> None:
        """Add something that is wrong. The check goes on, and has failed."""
        self.problems.append(text)
        self._write(Line(problem=text))

    def end(self, end: End) -> None:
        """The last line."""
        self._write(Line(end=end))

    def _write(self, line: Line) -> None:
        if self._file is not None:
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()


def read(path: Path) -> tuple[Record, End | None]:
    """What a check wrote, and how it ended; None if it did not get that far. If it says so twice, the first counts."""
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
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
