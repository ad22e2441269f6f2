"""What is on the disk: written whole or not there, waited for, erased to the last byte, and an error that says where that could not be."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedssl.errors import DiskError


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes ``path``: no room, no right, a read-only or a broken disk become a DiskError that names it."""
    try:
        yield
    except IsADirectoryError:
        raise DiskError(f"{path}: a folder is there; wanted the name of a file") from None
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written ({error.strerror or error}); make room, or get the right to write there, and do the same again (a run: --resume). "
            "What was whole still is"
        ) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, for the block to fill, that takes its name, synced, when the block ends well, and is removed when it does not.

    Raises DiskError where it cannot be written; then, and where the process is killed, ``path`` is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file: whole, or as it was. Raises DiskError."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def erase_deleted(file: sqlite3.Connection, path: Path) -> None:
    """Leave nothing of deleted rows in the bytes of a database: it is built anew, and its log emptied. Raises DiskError where it cannot be now."""
    try:
        for statement in ("PRAGMA temp_store = MEMORY", "PRAGMA wal_checkpoint(TRUNCATE)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
            answer = file.execute(statement).fetchone()
            if answer is not None and answer[0]:
                raise sqlite3.OperationalError("another process is using it")
    except sqlite3.Error as error:
        raise DiskError(f"{path}: rows are deleted, but their bytes are not all overwritten yet ({error}); make room and forget again") from None
