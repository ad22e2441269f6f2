"""RecBole's atomic `.inter` files: tab-separated, a typed header, one event a line. Read and written here.

The columns `user_id` and `item_id` must be there, `timestamp` may be; all others are passed over.
Source: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedssl.data.interactions import Interactions
from fedssl.data.readers.blocks import BadLines, Block, check_events
from fedssl.data.readers.columns import find_places, read_columns
from fedssl.data.readers.text import first_line
from fedssl.errors import DataError

_TYPES = ("token", "token_seq", "float", "float_seq")
_WANTED = "wanted tab-separated `user_id:token`, `item_id:token` and perhaps `timestamp:float`"


def has_typed_header(line: str) -> bool:
    """Whether ``line`` is a header of an atomic file: every tab-separated field is `name:type`."""
    return all(name and kind in _TYPES for name, _, kind in (field.rpartition(":") for field in line.split("\t")))


def read_typed_header(path: Path) -> list[str]:
    """The column names of an atomic file. Raises DataError where the first line is no typed header, or names one twice."""
    line = first_line(path)
    if not has_typed_header(line):
        raise DataError(f"{path}: the first line, {line[:60]!r}, is not a RecBole header; {_WANTED}")
    names = [field.rpartition(":")[0] for field in line.split("\t")]
    if len(set(names)) != len(names):
        raise DataError(f"{path}: the header names a column twice: {', '.join(names)}")
    return names


def read_inter(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a `.inter` file, plain or gzip, in file order.

    ``columns``: other names of user, item and perhaps time, without their types. Raises DataError for a missing column; a line
    with too many or few fields, an empty token, or a timestamp that is not a finite number goes to ``bad``.
    """
    names = read_typed_header(path)
    usual = ("user_id", "item_id", "timestamp") if "timestamp" in names else ("user_id", "item_id")
    places = find_places(names, columns or usual)
    if isinstance(places, str):
        raise DataError(f"{path}: {places if columns else places.partition(';')[0] + '; ' + _WANTED}")
    for numbers, fields in read_columns(path, "\t", len(names), bad):
        yield check_events(numbers, fields[places.user], fields[places.item], None if places.time is None else fields[places.time], bad)


def write_inter(interactions: Interactions, path: Path, *, append: bool = False) -> None:
    """Write events as a `.inter` file that `read_inter` reads back alike; ``append``: behind those of a file, which has the header.

    Raises DataError for a token with a tab or a line end.
    """
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
    with path.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
        if not append:
            file.write(header + "\n")
        file.writelines("\t".join(event) + "\n" for event in zip(*columns))
