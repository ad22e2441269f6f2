"""Whether the files behind mapped columns are still those that were opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fedssl.errors import DataError


class Mark(NamedTuple):
    """A file as it was when it was opened: which it is, its size in bytes, and when it was last written."""

    path: Path
    inode: int
    size: int
    written_ns: int


def marks_of(paths: Iterable[Path]) -> tuple[Mark, ...]:
    """Marks of those files that are there. Take them before the files are mapped, so that nothing slips between."""
    marks = []
    for path in paths:
        with suppress(OSError):
            about = os.stat(path)
            marks.append(Mark(path, about.st_ino, about.st_size, about.st_mtime_ns))
    return tuple(marks)


@contextmanager
def unchanged(events: object) -> Iterator[None]:
    """Hold what the block made of `Histories` to this: the files of their store were not written since they were opened.

    Raises DataError where one was written, replaced or removed, also instead of the error that this led to; what was made of it is to be
    thrown away.
    """
    try:
        yield
    finally:
        marks: tuple[Mark, ...] = getattr(events, "marks", ())
        for mark in set(marks) - set(marks_of(mark.path for mark in marks)):
            raise DataError(
                f"{mark.path}: changed, replaced or removed while it was used; nothing of this round was kept. "
                "Put the store back as it was and do the same again (a run: --resume), or start a new run with the store that is there now"
            )
