"""Parquet: the columns of user, item and perhaps time by name, a group of rows at a time. Needs pyarrow (the extra `sim`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.data.readers.blocks import BadLines, Block
from fedssl.data.readers.columns import find_places
from fedssl.errors import DataError

MAGIC = b"PAR1"
ROWS = 1 << 16
_SECONDS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


def read_parquet(path: Path, columns: Sequence[str], bad: BadLines) -> Iterator[Block]:
    """Events of a Parquet file in file order. ``columns``: names of user, item and perhaps time; none: usual names.

    Tokens are text or whole numbers; a time is a number, or a date or timestamp, which becomes seconds since 1970 (UTC). Raises
    DataError for a damaged file, a missing column, or one of another type. A row without a user or an item, or whose time is
    missing or not finite, goes to ``bad``.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; install it with: pip install 'fedssl[sim]'") from None
    bad.unit, first = "row", 1
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            places = find_places(names, columns)
            if isinstance(places, str):
                raise DataError(f"{path}: {places}")
            wanted = [names[at] for at in places if at is not None]
            for batch in file.iter_batches(batch_size=ROWS, columns=wanted):
                users, items = (_tokens(batch.column(name), f"{path}: column {name}", pa) for name in wanted[:2])
                times = _times(batch.column(wanted[2]), f"{path}: column {wanted[2]}", pa) if len(wanted) == 3 else None
                yield _check(first, users, items, times, bad)
                first += len(users)
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})") from None


def _check(first: int, users: list[str | None], items: list[str | None], times: NDArray[np.float64] | None, bad: BadLines) -> Block:
    kept = []
    for at, (user, item) in enumerate(zip(users, items)):
        if not user or not item:
            bad.add(first + at, f"an empty {'item' if user else 'user'} token; give every event a user and an item")
        elif times is not None and not np.isfinite(times[at]):
            bad.add(first + at, f"time {times[at]} is missing or not finite; seconds since 1970 are usual")
        else:
            kept.append(at)
    return Block([users[at] or "" for at in kept], [items[at] or "" for at in kept], None if times is None else times[kept])


def _tokens(column: Any, where: str, pa: Any) -> list[str | None]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{where} is of type {column.type}; wanted text or whole numbers")
    tokens: list[str | None] = column.cast(pa.string()).to_pylist()
    return tokens


def _times(column: Any, where: str, pa: Any) -> NDArray[np.float64]:
    kind, unit = column.type, 1.0
    if pa.types.is_date(kind):
        column, unit = column.cast(pa.timestamp("s")).cast(pa.int64()), 1.0
    elif pa.types.is_timestamp(kind):
        column, unit = column.cast(pa.int64()), _SECONDS[kind.unit]
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where} is of type {kind}; wanted a number, a date or a timestamp")
    values: NDArray[np.float64] = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)
    return values / unit
