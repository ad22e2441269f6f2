"""Lines cut into columns at a separator or by the rules of CSV, and the columns that hold user, item and time found by name."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fedssl.data.readers.blocks import BadLines
from fedssl.data.readers.text import first_line, read_blocks
from fedssl.errors import DataError

USER_NAMES = ("user_id", "userid", "user", "uid", "reviewerid", "customer_id")
ITEM_NAMES = ("item_id", "itemid", "item", "iid", "movie_id", "movieid", "parent_asin", "asin", "product_id")
TIME_NAMES = ("timestamp", "time", "unixreviewtime")
"""What columns are commonly called, in small letters; others are named in [data] columns."""

CSV = ","
"""The one separator that quotes can hide: fields are cut as in RFC 4180, but a record stands on one line."""


class Places(NamedTuple):
    """Where in a row user, item and time stand; ``time`` is None where there is none."""

    user: int
    item: int
    time: int | None


def find_places(names: Sequence[str], wanted: Sequence[str]) -> Places | str:
    """The columns called ``wanted`` (user, item and perhaps time), or, where none are wanted, those with a common name.

    A text says why they cannot be told. A row with `asin` and `parent_asin` (Amazon 2023) is about the parent.
    """
    if len(set(names)) != len(names):
        return f"the header names a column twice: {', '.join(names)}"
    if wanted:
        missing = [name for name in wanted if name not in names]
        if missing:
            return f"no column {' and '.join(missing)} among {', '.join(names)}; name user, item and perhaps time in [data] columns"
        user, item, *time = (names.index(name) for name in wanted)
        return Places(user, item, time[0] if time else None)
    found: list[int | None] = []
    for what, known in (("user", USER_NAMES), ("item", ITEM_NAMES), ("time", TIME_NAMES)):
        places = [at for at, name in enumerate(names) if name.lower() in known and not (name == "asin" and "parent_asin" in names)]
        if len(places) > 1 or (not places and what != "time"):
            seen = " and ".join(names[at] for at in places)
            reason = f"{seen} could both be the {what}" if places else f"none of the columns {', '.join(names)} is called as a {what} usually is"
            return f"{reason}; name user, item and perhaps time in [data] columns"
        found.append(places[0] if places else None)
    user_at, item_at, time_at = found
    assert user_at is not None and item_at is not None
    return Places(user_at, item_at, time_at)


def cut_line(line: str, separator: str) -> list[str] | str:
    """The fields of one line, or a text that says why it cannot be cut."""
    if separator != CSV or '"' not in line:
        return line.split(separator)
    try:
        rows = list(csv.reader([line], strict=True))
    except csv.Error as error:
        return f"not CSV on one line ({error}): {line[:60]!r}"
    return rows[0] if rows else []


def numbered_lines(path: Path, bad: BadLines | None = None, *, is_latin: bool = False) -> Iterator[tuple[Sequence[int], list[str]]]:
    """Blocks of (line numbers, lines), blank lines left out. Raises DataError as `read_blocks` does."""
    for first, lines in read_blocks(path, bad, is_latin=is_latin):
        numbers: Sequence[int] = range(first, first + len(lines))
        if "" in lines:
            numbers = [number for number, line in zip(numbers, lines) if line]
            lines = [line for line in lines if line]
        if lines:
            yield numbers, lines


def read_columns(
    path: Path, separator: str, width: int, bad: BadLines, *, has_header: bool = True, wanted: str = "", is_latin: bool = False
) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """Blocks of (line numbers, ``width`` columns of text), under the header where there is one. Blank lines are passed over.

    A line with another number of fields goes to ``bad``. ``wanted``: what the width comes from, for that message.
    """
    for numbers, lines in numbered_lines(path, bad, is_latin=is_latin):
        if has_header:
            numbers, lines, has_header = numbers[1:], lines[1:], False
        if not lines:
            continue
        columns = _cut_all(lines, separator, width)
        if columns is None:
            kept, rows = [], []
            for number, line in zip(numbers, lines):
                row = cut_line(line, separator)
                if isinstance(row, str):
                    bad.add(number, row)
                elif len(row) != width:
                    bad.add(number, f"{len(row)} fields where {wanted or f'the header has {width}'}: {line[:60]!r}")
                else:
                    kept.append(number)
                    rows.append(row)
            numbers, columns = kept, [[row[at] for row in rows] for at in range(width)]
        yield numbers, columns


def read_header(path: Path, separator: str) -> list[str]:
    """The names in the first line. Raises DataError where it cannot be cut, or a name is empty."""
    line = first_line(path)
    names = cut_line(line, separator)
    if isinstance(names, str) or not all(names):
        raise DataError(f"{path}: wanted a header that names every column, not {line[:60]!r}")
    return names


def _cut_all(lines: list[str], separator: str, width: int) -> list[list[str]] | None:
    """The columns of many lines at once; None where a line is odd."""
    if separator == CSV and any('"' in line for line in lines):
        try:
            rows = list(csv.reader(lines, strict=True))
        except csv.Error:
            return None
        # Fewer rows than lines: a quote was left open. Then every line is cut by itself.
        return [list(column) for column in zip(*rows)] if len(rows) == len(lines) and all(len(row) == width for row in rows) else None
    if any(line.count(separator) != width - 1 for line in lines):
        return None
    if len(separator) == 1:
        fields = separator.join(lines).split(separator)
        return [fields[at::width] for at in range(width)]
    rows = [line.split(separator) for line in lines]
    return [[row[at] for row in rows] for at in range(width)]
