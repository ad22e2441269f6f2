"""RecBole's atomic `.inter` files: tab-separated, a typed header, one event a line. Read and written here.

The columns `user_id` and `item_id` must be there, `timestamp` may be; all others are passed over.
Source: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedssl.data.interactions import Interactions
from fedssl.data.readers.text import first_line, read_blocks
from fedssl.errors import DataError

_TYPES = ("token", "token_seq", "float", "float_seq")
_WANTED = "wanted tab-separated `user_id:token`, `item_id:token` and perhaps `timestamp:float`"


def has_typed_header(line: str) -> bool:
    """Whether ``line`` is a header of an atomic file: every tab-separated field is `name:type`."""
    return all(name and kind in _TYPES for name, _, kind in (field.rpartition(":") for field in line.split("\t")))


def read_header(path: Path) -> list[str]:
    """The column names of an atomic file. Raises DataError where the first line is no typed header, or names one twice."""
    line = first_line(path)
    if not has_typed_header(line):
        raise DataError(f"{path}: the first line, {line[:60]!r}, is not a RecBole header; {_WANTED}")
    names = [field.rpartition(":")[0] for field in line.split("\t")]
    if len(set(names)) != len(names):
        raise DataError(f"{path}: the header names a column twice: {', '.join(names)}")
    return names


def read_columns(path: Path, width: int) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """Blocks of (line numbers, ``width`` columns of text) under the header. Blank lines are passed over.

    Raises DataError for a line with another number of fields.
    """
    header_is_read = False
    for first, lines in read_blocks(path):
        numbers: Sequence[int] = range(first, first + len(lines))
        if "" in lines:
            numbers = [number for number, line in zip(numbers, lines) if line]
            lines = [line for line in lines if line]
        if not lines:
            continue
        if not header_is_read:
            numbers, lines, header_is_read = numbers[1:], lines[1:], True
        tabs = [line.count("\t") for line in lines]
        if tabs.count(width - 1) != len(tabs):
            bad = next(at for at, count in enumerate(tabs) if count != width - 1)
            raise DataError(f"{path}, line {numbers[bad]}: {tabs[bad] + 1} fields where the header has {width}: {lines[bad][:60]!r}")
        if lines:
            fields = "\t".join(lines).split("\t")
            yield numbers, [fields[column::width] for column in range(width)]


def read_inter(path: Path) -> Interactions:
    """Events of a `.inter` file, plain or gzip, in file order; tokens are coded in order of first appearance.

    Raises DataError with file, line and reason for a missing column, an empty token, or a timestamp that is not a finite number.
    """
    names = read_header(path)
    if missing := [name for name in ("user_id", "item_id") if name not in names]:
        raise DataError(f"{path}: no column {' and '.join(missing)} among {', '.join(names)}; {_WANTED}")
    codes: dict[str, dict[str, int]] = {"user_id": {}, "item_id": {}}
    users, items, times = [], [], []
    for numbers, columns in read_columns(path, len(names)):
        users.append(_encode(columns[names.index("user_id")], codes["user_id"], numbers, "user", path))
        items.append(_encode(columns[names.index("item_id")], codes["item_id"], numbers, "item", path))
        if "timestamp" in names:
            times.append(_floats(columns[names.index("timestamp")], numbers, path))
    if not users:
        raise DataError(f"{path}: a header without events; {_WANTED}, then one event a line")
    return Interactions(
        users=np.concatenate(users),
        items=np.concatenate(items),
        times=np.concatenate(times) if times else None,
        user_tokens=tuple(codes["user_id"]),
        item_tokens=tuple(codes["item_id"]),
    )


def write_inter(interactions: Interactions, path: Path) -> None:
    """Write events as a `.inter` file that `read_inter` reads back alike. Raises DataError for a token with a tab or a line end."""
    for token in interactions.user_tokens + interactions.item_tokens:
        if not token or any(mark in token for mark in "\t\r\n"):
            raise DataError(f"{path}: token {token!r} is empty or holds a tab or line end; it cannot stand in a `.inter` file")
    columns = [
        [interactions.user_tokens[code] for code in interactions.users.tolist()],
        [interactions.item_tokens[code] for code in interactions.items.tolist()],
    ]
    header = "user_id:token\titem_id:token"
    if interactions.times is not None:
        # 17 significant digits give every float64 back; whole seconds stay short.
        columns.append([f"{time:.17g}" for time in interactions.times.tolist()])
        header += "\ttimestamp:float"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(header + "\n")
        file.writelines("\t".join(event) + "\n" for event in zip(*columns))


def _encode(column: list[str], codes: dict[str, int], numbers: Sequence[int], what: str, path: Path) -> NDArray[np.int64]:
    coded = np.fromiter((codes.setdefault(token, len(codes)) for token in column), np.int64, len(column))
    if "" in codes:
        raise DataError(f"{path}, line {numbers[column.index('')]}: an empty {what} token; give every event a user and an item")
    return coded


def _floats(column: list[str], numbers: Sequence[int], path: Path) -> NDArray[np.float64]:
    try:
        values = np.array(list(map(float, column)), dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
    except ValueError:
        bad = np.array([at for at, text in enumerate(column) if not _is_float(text)])
    if len(bad):
        raise DataError(f"{path}, line {numbers[bad[0]]}: timestamp {column[bad[0]]!r} is not a finite number; seconds since 1970 are usual")
    return values


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
