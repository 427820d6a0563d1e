"""Reads traffic from the files of public traces. An error names the line that cannot be read."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from sglang_shift.simulate.traffic import Request

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")

MOONCAKE_BLOCK = 512.0
"""Tokens that a hash id of a Mooncake trace stands for (source: the README of the traces)."""

MAX_TOKENS = 10**9
MAX_SECONDS = 1e12
"""Limits: no request has more tokens, and no time is later. Beside larger numbers, small numbers would be lost."""

EMPTY = "it is empty"

Row = tuple[float, int, int, tuple[int, ...]]
"""Time in seconds, tokens of prompt and of output, blocks."""

Line = TypeVar("Line")
Parsed = TypeVar("Parsed")

_short = Repr()
_short.maxstring = _short.maxlong = _short.maxother = 40


def read_azure(path: Path) -> list[Request]:
    """Read a trace of Azure, of 2023 or 2024: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens.

    The columns may be in any order, and other columns may be beside them. Commas, semicolons or tabs separate the
    columns. Case, spaces and underscores in their names do not matter. Times are in ISO 8601, with or without zones.
    The result counts them from the first request. Rows may be in any order. Rows without a prompt or output are left
    out.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not such a trace. The message names the line that is wrong.
    """
    rows = _csv_rows(path)
    number, header = next(rows, (0, []))
    if not header:
        raise ValueError(EMPTY)
    row_of = _parse_line(number, _AzureRow, header)
    return _requests([_parse_line(number, row_of, cells) for number, cells in rows])


def read_mooncake(path: Path) -> list[Request]:
    """Read a trace of Mooncake: lines of JSON with timestamp (milliseconds), input_length, output_length and hash_ids.

    The result counts times from the first request. If there are hash ids, they become the blocks of the requests. Lines
    may be in any order. Lines without a prompt or output are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not such a trace. The message names the line that is wrong.
    """
    with path.open(encoding="utf-8-sig", errors="backslashreplace") as file:
        rows = [_parse_line(number, _mooncake_row, line) for number, line in enumerate(file, 1) if line.strip()]
    if not rows:
        raise ValueError(EMPTY)
    return _requests(rows)


def read_trace(path: Path) -> list[Request]:
    """Read a trace by its suffix: ``.csv`` or ``.tsv`` with :func:`read_azure`, others with :func:`read_mooncake`."""
    return read_azure(path) if path.suffix.lower() in (".csv", ".tsv") else read_mooncake(path)


def _parse_line(number: int, parse: Callable[[Line], Parsed], line: Line) -> Parsed:
    """Return what ``parse`` makes of a line. Its errors get the number of the line."""
    try:
        return parse(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line, and the cells, of each row that is not blank."""
    # Bytes that are not UTF-8 do no harm in columns that are not read. In other columns, the message shows them.
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        head = []
        for line in file:
            head.append(line)
            if line.strip():
                break
        delimiter = max(",;\t", key="".join(head).count)
        reader = csv.reader(chain(head, file), delimiter=delimiter, skipinitialspace=True, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = [cell.strip() for cell in next(reader)]
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"line {number}: {error}") from error
            if any(cells):
                yield number, cells


class _AzureRow:
    """Reads the numbers in a row's cells. The header says which columns hold them."""

    def __init__(self, header: Sequence[str]) -> None:
        names = [_normalize_name(name) for name in header]
        for name in AZURE:
            if names.count(_normalize_name(name)) > 1:
                raise ValueError(f"there are two columns {name}")
        if not {*map(_normalize_name, AZURE)} <= {*names}:
            found = ", ".join(_short.repr(name) for name in header[:4]) + (", ..." if len(header) > 4 else "")
            raise ValueError(f"the columns are {found}; {', '.join(AZURE)} are needed")
        self._columns = tuple(names.index(_normalize_name(name)) for name in AZURE)
        self._zoned: bool | None = None

    def __call__(self, cells: Sequence[str]) -> Row:
        if max(self._columns) >= len(cells):
            missing = next(name for name, column in zip(AZURE, self._columns, strict=True) if column >= len(cells))
            raise ValueError(f"no {missing}")
        time, prompt, output = (cells[column] for column in self._columns)
        return (
            self._time(time), _tokens(AZURE[1], prompt, _number(prompt)), _tokens(AZURE[2], output, _number(output)), ()
        )  # fmt: skip

    def _time(self, text: str) -> float:
        try:
            # A plain number is refused: it could be seconds or milliseconds. ``fromisoformat`` takes some for dates.
            time = datetime.fromisoformat(text) if "-" in text else None
        except ValueError:
            time = None
        if time is None:
            raise ValueError(f"{AZURE[0]} {_short.repr(text)} is not a time in ISO 8601")
        zoned = time.tzinfo is not None
        if self._zoned not in (None, zoned):
            raise ValueError(f"{AZURE[0]} {_short.repr(text)} has {'a' if zoned else 'no'} zone, unlike those before")
        self._zoned = zoned
        return (time if zoned else time.replace(tzinfo=UTC)).timestamp()


def _normalize_name(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _number(text: str) -> float | None:
    if text.isdecimal() and len(text) < 20:
        return int(text)
    try:
        return float(text)
    except ValueError:
        return None


def _mooncake_row(line: str) -> Row:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("it is not JSON: it is nested too deeply") from error
    if not isinstance(entry, dict):
        raise ValueError("it is not a JSON object")
    for name in MOONCAKE:
        if name not in entry:
            raise ValueError(f"no {name}")
    time, prompt, output = (entry[name] for name in MOONCAKE)
    if not (_is_number(time) and abs(time) < 1e3 * MAX_SECONDS):
        raise ValueError(f"{MOONCAKE[0]} {_short.repr(time)} is not a number of milliseconds")
    blocks = entry.get("hash_ids")
    blocks = [] if blocks is None else blocks
    if not isinstance(blocks, list):
        raise ValueError(f"hash_ids {_short.repr(blocks)} is not a list")
    for block in blocks:
        if type(block) is not int:
            raise ValueError(f"hash_ids has {_short.repr(block)}, which is not a whole number")
    return time / 1e3, _tokens(MOONCAKE[1], prompt, prompt), _tokens(MOONCAKE[2], output, output), tuple(blocks)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # ``isinstance`` would accept a bool, which is an int


def _tokens(name: str, given: Any, number: Any) -> int:
    if type(number) is int and 0 <= number <= MAX_TOKENS:
        return number
    if not (_is_number(number) and 0 <= number <= MAX_TOKENS and math.floor(number) == number):
        raise ValueError(f"{name} {_short.repr(given)} is not a whole number from 0 to {MAX_TOKENS}")
    return int(number)


def _requests(rows: Sequence[Row]) -> list[Request]:
    rows = sorted((row for row in rows if row[1] and row[2]), key=lambda row: row[0])
    if not rows:
        raise ValueError("it has no request with a prompt and an output")
    return [
        Request(time - rows[0][0], prompt, output, blocks, MOONCAKE_BLOCK if blocks else 0.0)
        for time, prompt, output, blocks in rows
    ]
