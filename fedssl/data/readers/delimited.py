"""CSV and TSV with a header: the columns of user, item and perhaps time by name, MovieLens' `ratings.csv` among them.

CSV is cut as in RFC 4180, with a record on one line; in TSV a quote is a letter like others. All other columns are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedssl.data.readers.blocks import BadLines, Block, check_events
from fedssl.data.readers.columns import CSV, find_places, read_columns, read_header
from fedssl.errors import DataError


def read_csv(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a CSV file, plain or gzip, in file order. ``columns``: names of user, item and perhaps time; none: usual names.

    Raises DataError for a header without them. A line that is not CSV, or has other than the header's fields, an empty token, or
    a time that is not a finite number goes to ``bad``.
    """
    return _read(path, CSV, columns, bad)


def read_tsv(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a tab-separated file with a header, as `read_csv` reads them, without quotes."""
    return _read(path, "\t", columns, bad)


def _read(path: Path, separator: str, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    names = read_header(path, separator)
    places = find_places(names, columns)
    if isinstance(places, str):
        raise DataError(f"{path}: {places}")
    for numbers, fields in read_columns(path, separator, len(names), bad):
        yield check_events(numbers, fields[places.user], fields[places.item], None if places.time is None else fields[places.time], bad)
