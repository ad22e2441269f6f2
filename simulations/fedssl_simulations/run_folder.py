"""The folder that a run leaves behind: taken by one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedssl.errors import RunFolderError
from fedssl.run_lock import held


@contextmanager
def claim(folder: Path, *, resume: bool) -> Iterator[Path]:
    """Hold ``folder`` for this process. A new run wants it absent or empty, a resume wants a run in it.

    Raises RunFolderError otherwise, where another process holds it, and where it cannot be written.
    """
    try:
        holds_run = (folder / "run.toml").exists()
        if resume and not holds_run:
            raise RunFolderError(f"{folder}: no run.toml, so there is no run to resume here; start one with --out {folder}")
        if not resume and folder.exists() and (not folder.is_dir() or any(not _is_left_over(entry) for entry in folder.iterdir())):
            raise RunFolderError(f"{folder}: not empty; resume that run with --resume {folder}, or choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written ({error.strerror}); make it writable, or choose another folder") from None
    with held(folder):
        for left_over in folder.glob(".*.partial"):
            left_over.unlink(missing_ok=True)
        yield folder


def _is_left_over(entry: Path) -> bool:
    """What a process leaves that was killed before run.toml was there: nothing that could be resumed."""
    return entry.name == "run.lock" or (entry.name.startswith(".") and entry.name.endswith(".partial"))
