"""The folder that a run leaves behind: taken by one process at a time, appended to line by line, cut back on a resume."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedssl.errors import RunFolderError

# What a process leaves that was killed before run.toml was there: nothing that could be resumed.
_BEFORE_A_RUN = ("run.lock", "run.toml.new")


@contextmanager
def claim(folder: Path, *, resume: bool) -> Iterator[Path]:
    """Hold ``folder`` for this process. A new run wants it absent or empty, a resume wants a run in it.

    Raises RunFolderError otherwise, and where another process holds it.
    """
    holds_run = (folder / "run.toml").exists()
    if resume and not holds_run:
        raise RunFolderError(f"{folder}: no run.toml, so there is no run to resume here; start one with --out {folder}")
    if not resume and folder.exists() and (not folder.is_dir() or any(entry.name not in _BEFORE_A_RUN for entry in folder.iterdir())):
        raise RunFolderError(f"{folder}: not empty; resume that run with --resume {folder}, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("w")
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"{folder}: another process is running in it; wait for it, or choose another --out") from None
        yield folder


def append_line(path: Path, values: dict[str, Any]) -> None:
    """One JSON object as one line, in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a torn last line is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            raise RunFolderError(f"{path}: a line is not JSON; the file was changed, remove it to go on without the old curve") from None
    return found


def cut_back(path: Path, *, phase: str, round: int, phases: list[str]) -> None:
    """Drop the lines of rounds after (phase, round): they will be run again."""
    place = {name: number for number, name in enumerate(phases)}
    kept = [line for line in read_lines(path) if (place.get(line["phase"], -1), line["round"]) <= (place.get(phase, -1), round)]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def write_whole(path: Path, text: str) -> None:
    """Write a file beside and rename it: whole, or as it was."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
