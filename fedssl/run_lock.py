"""A folder, held by one process at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedssl.errors import RunFolderError


@contextmanager
def held(folder: Path, lock_name: str = "run.lock") -> Iterator[None]:
    """Hold ``folder`` for this process by a file in it; the hold ends with the process, however it ends.

    Raises RunFolderError where another process holds it, and where it cannot be written.
    """
    try:
        lock = (folder / lock_name).open("w")
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written ({error.strerror}); make it writable, or take a copy of it elsewhere") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"{folder}: another process is running in it; wait for it, or choose another folder") from None
        yield
