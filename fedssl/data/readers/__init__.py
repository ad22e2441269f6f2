"""Reading histories: one file per format, a dict for look-up, and a look at the content where no format is named.

A format of one's own is a function from a path to `Interactions`, given by object or as `"package.module:name"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fedssl.data.interactions import Interactions
from fedssl.data.paths import find_path
from fedssl.data.readers.blocks import BadLines, Block, collect
from fedssl.data.readers.columns import CSV, ITEM_NAMES, USER_NAMES, cut_line, find_places
from fedssl.data.readers.delimited import read_csv, read_tsv
from fedssl.data.readers.inter import has_typed_header, read_inter, write_inter
from fedssl.data.readers.items import read_items
from fedssl.data.readers.jsonl import parse_object, read_jsonl
from fedssl.data.readers.lines import read_lines, write_lines
from fedssl.data.readers.movielens import read_movielens
from fedssl.data.readers.pairs import read_pairs
from fedssl.data.readers.parquet import MAGIC, read_parquet
from fedssl.data.readers.text import first_block
from fedssl.data.readers.users import read_users
from fedssl.errors import ConfigError, DataError
from fedssl.names import find

__all__ = [
    "FORMATS",
    "BadLines",
    "Block",
    "Format",
    "Reader",
    "find_format",
    "find_reader",
    "read_events",
    "read_interactions",
    "read_items",
    "read_users",
    "write_inter",
    "write_lines",
]

Reader = Callable[[Path], Interactions]
"""A reader of one's own."""


class Format(NamedTuple):
    """A format that ships: how it is read, what it looks like, and whether [data] columns names its columns.

    ``read``: path, names of columns (or none), and what happens to bad lines -> blocks of events. ``is_surely``: whether the lines
    at the start of a file, under these names of columns, can be of no other format; ``could_be``: whether they might be of this one.
    """

    read: Callable[[Path, Sequence[str], BadLines], Iterator[Block]]
    is_surely: Callable[[list[str], Sequence[str]], bool]
    could_be: Callable[[str], bool]
    has_columns: bool = False


FORMATS: dict[str, Format] = {
    "inter": Format(read_inter, lambda lines, columns: has_typed_header(lines[0]), has_typed_header, has_columns=True),
    "lines": Format(
        read_lines, lambda lines, columns: _are_words(lines) and not _are_pairs(lines), lambda line: len(line.split()) > 1 and line[0] not in "{[<"
    ),
    "pairs": Format(read_pairs, lambda lines, columns: _are_words(lines) and _are_pairs(lines), lambda line: len(line.split()) == 2 and line[0] not in "{[<"),
    "movielens": Format(read_movielens, lambda lines, columns: _is_rating(lines[0]), lambda line: line.count("::") == 3),
    "csv": Format(read_csv, lambda lines, columns: _has_names(lines[0], CSV, columns), lambda line: "," in line and line[0] not in "{[", has_columns=True),
    "tsv": Format(read_tsv, lambda lines, columns: _has_names(lines[0], "\t", columns), lambda line: "\t" in line, has_columns=True),
    "jsonl": Format(read_jsonl, lambda lines, columns: _has_keys(lines[0], columns), lambda line: line.startswith("{"), has_columns=True),
    "parquet": Format(read_parquet, lambda lines, columns: False, lambda line: False, has_columns=True),  # told by its first bytes
}


def read_interactions(path: str | Path, format: str | Reader = "auto", *, columns: Sequence[str] = (), skip_bad_lines: bool = False) -> Interactions:
    """The events of a file, in file order.

    ``path``: as it is, else in $FEDSSL_DATA. ``format``: auto (found by looking), a name in FORMATS, `package.module:name`, or a
    reader. ``columns``: what user, item and perhaps time are called in a file with named columns. ``skip_bad_lines``: count lines that
    cannot be read (``bad_lines`` of the result) instead of stopping at the first.

    Raises DataError for a file that is missing, empty, damaged or of another format; ConfigError for an unknown format, or for
    settings that it does not take.
    """
    found, reader = _open(path, format, columns, skip_bad_lines)
    if not isinstance(reader, Format):
        interactions = reader(found)
        if not isinstance(interactions, Interactions):
            raise ConfigError(f"[data] format {format!r}: returned {type(interactions).__name__}; a reader returns fedssl.data.interactions.Interactions")
        return interactions
    bad = BadLines(found, skip_bad_lines)
    nothing = "a header without events" if reader.has_columns else "the file holds blank lines only"
    return collect(reader.read(found, columns, bad), bad, f"{nothing}; wanted one event or one user a line")


def read_events(path: str | Path, format: str = "auto", *, columns: Sequence[str] = (), skip_bad_lines: bool = False) -> tuple[Iterator[Block], BadLines]:
    """The same events a block at a time, in little memory, and the count of bad lines, which grows as blocks are read.

    Raises as `read_interactions` does, for what is met on the way while the blocks are read; ConfigError for a reader of one's own.
    """
    found, reader = _open(path, format, columns, skip_bad_lines)
    if not isinstance(reader, Format):
        raise ConfigError(f"[data] format {format!r}: a reader of one's own gives all events at once; only formats that ship are read in blocks")
    bad = BadLines(found, skip_bad_lines)
    return reader.read(found, columns, bad), bad


def find_format(path: Path, columns: Sequence[str] = ()) -> str:
    """The format of a file, by its start and not its name; ``columns`` are names it must have, where given.

    Raises DataError where it cannot be told surely, with those that it could be. So `1<tab>2<tab>3` without a header is refused
    rather than guessed at: it could be three items of a user, or a user, an item and a rating.
    """
    if _first_bytes(path) == MAGIC:
        return "parquet"
    lines = first_block(path, is_text=True)
    sure = [name for name, format in FORMATS.items() if (format.has_columns or not columns) and format.is_surely(lines, columns)]
    if len(sure) == 1:
        return sure[0]
    possible = [name for name, format in FORMATS.items() if format.could_be(lines[0])]
    raise DataError(
        f"{path}: starts with {lines[0][:60]!r}, which is surely none of {', '.join(FORMATS)}; "
        + (f"it could be {' or '.join(possible)}: set [data] format, and [data] columns where columns have names of their own" if possible else "convert it")
    )


def find_reader(name: str) -> Format | Reader:
    """The format or reader called ``name``: one of FORMATS, or `package.module:name`. Raises ConfigError for anything else."""
    reader: Format | Reader = find(FORMATS, name, what="[data] format")
    return reader


def _open(path: str | Path, format: str | Reader, columns: Sequence[str], skip_bad_lines: bool) -> tuple[Path, Format | Reader]:
    found = find_path(path)
    if found.is_dir():
        raise DataError(f"{found}: a folder, not a file of histories; a folder that `fedssl data convert` made goes straight into [data] path")
    name = format if callable(format) else find_format(found, columns) if format == "auto" else format
    reader = name if callable(name) else find_reader(name)
    if columns and not (isinstance(reader, Format) and reader.has_columns):
        raise ConfigError(f"[data] columns = {list(columns)}: format {name!r} has no columns with names; leave columns empty, or set another format")
    if skip_bad_lines and not isinstance(reader, Format):
        raise ConfigError(f"[data] skip_bad_lines: format {name!r} is a reader of one's own, which decides on bad lines itself; leave it false")
    return found, reader


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _has_names(line: str, separator: str, columns: Sequence[str]) -> bool:
    """Whether a line is a header, cut at ``separator``, that tells which column is which."""
    names = cut_line(line, separator)
    is_json = separator == CSV and line[0] in "{["
    return not is_json and not isinstance(names, str) and len(names) > 1 and all(names) and not isinstance(find_places(names, columns), str)


def _has_keys(line: str, columns: Sequence[str]) -> bool:
    found = parse_object(line) if line.startswith("{") else ""
    return not isinstance(found, str) and not isinstance(find_places(list(found), columns), str)


def _is_rating(line: str) -> bool:
    *fields, time = line.split("::")
    return len(fields) == 3 and all(fields) and time.strip().isdigit()


def _are_words(lines: list[str]) -> bool:
    """Whether the first line is two or more words with spaces between them, and no header or other format."""
    words = lines[0].split()
    if "\t" in lines[0] or len(words) < 2 or "," in words[0] or "::" in words[0] or words[0][0] in "{[<":
        return False
    small = {word.lower() for word in words}
    return not (small & set(USER_NAMES) and small & set(ITEM_NAMES))


def _are_pairs(lines: list[str]) -> bool:
    """Whether these are pairs `user item`: the first line is one, and a user comes twice, which `user item item ...` never has."""
    users = [words[0] for line in lines if (words := line.split(maxsplit=1))]
    return len(lines[0].split()) == 2 and len(set(users)) < len(users)
