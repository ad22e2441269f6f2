"""MovieLens' `ratings.dat`: `user::item::rating::time`, one event a line, no header. `ratings.csv` is read as CSV.

Source: https://files.grouplens.org/datasets/movielens/ml-1m-README.txt
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedssl.data.readers.blocks import BadLines, Block, check_events
from fedssl.data.readers.columns import read_columns


def read_movielens(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a `ratings.dat`, plain or gzip, in file order; the rating is passed over.

    A line with other than four fields, an empty token, or a time that is not a finite number goes to ``bad``.
    """
    for numbers, (users, items, _, times) in read_columns(path, "::", 4, bad, has_header=False, wanted="`user::item::rating::time` was wanted"):
        yield check_events(numbers, users, items, times, bad)
