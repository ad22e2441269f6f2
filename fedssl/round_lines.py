"""A file of rounds, one JSON object a line: appended to, read back whole, cut back on a resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedssl.disk import write_whole, writing
from fedssl.errors import RunFolderError


def append_line(path: Path, values: dict[str, Any]) -> None:
    """One JSON object as one line, in one write. Raises DiskError; what is left then is a torn line, which no reader takes for a round."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a torn last line is left out. Raises RunFolderError for any other that is no JSON."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            raise RunFolderError(f"{path}: a line is not JSON; the file was changed, remove it to go on without the old curve") from None
    return found


def cut_back(path: Path, *, phase: str, round: int, phases: Sequence[str]) -> None:
    """Drop the lines of rounds after (phase, round): they will be run again. ``phases``: all of them, in order."""
    place = {name: number for number, name in enumerate(phases)}
    kept = [line for line in read_lines(path) if (place.get(line["phase"], -1), line["round"]) <= (place.get(phase, -1), round)]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
