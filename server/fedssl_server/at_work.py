"""Whether the ServerApp of a run's folder is at work: Flower learns of its death after a minute, its lock at once."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fedssl.disk import writing
from fedssl.errors import RunFolderError

FILE, TRIES = "serverapp.lock", 20


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Hold a lock in ``folder`` while the block runs, and take its file away at the end, however the block ends. A process that dies leaves the file.

    Raises RunFolderError where another process is at work there, DiskError where it cannot be written.
    """
    path = folder / FILE
    with writing(path):
        lock = path.open("w")
    with lock:
        if not _taken(lock):
            raise RunFolderError(f"{folder}: another ServerApp is at work in it; wait for it, or choose another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _taken(lock: TextIO) -> bool:
    """Whether the lock could be had: who only looks (`has_died`) lets go in a moment."""
    for _ in range(TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.05)
    return False


def has_died(folder: Path) -> bool:
    """Whether a process died within `at_work`. Where one has just begun, for a moment too: look again before it is believed."""
    try:
        lock = (folder / FILE).open("r")
    except FileNotFoundError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return (folder / FILE).exists()


def forget_the_dead(folder: Path) -> None:
    """Take away what a process that died left in ``folder``."""
    if has_died(folder):
        (folder / FILE).unlink(missing_ok=True)
