"""The `fedssl` command, in this process, and a small run for it."""

from __future__ import annotations

import sys
from pathlib import Path

from fedssl_simulations.cli import main


def fedssl(*words: str | Path) -> int:
    """The exit code of a command."""
    before, sys.argv = sys.argv, ["fedssl", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def tiny_run(folder: Path, more: str = "") -> Path:
    """The RUN.toml of three rounds over 60 made-up users, whose histories it writes to ``folder``/h.txt. ``more``: further lines of `[data]`."""
    assert fedssl("data", "synthesize", folder / "h.txt", "--users", "60", "--items", "70", "--events", "12") == 0
    return write_tiny(folder, folder / "h.txt", more)


def write_tiny(folder: Path, histories: Path, more: str = "") -> Path:
    """``folder``/run.toml: three rounds over these histories."""
    (folder / "run.toml").write_text(_TINY.format(path=histories, more=more))
    return folder / "run.toml"


_TINY = """
[data]
path = "{path}"
{more}
[encoder]
width = 8
blocks = 1
heads = 1
hidden = 8
window = 10
[counts]
lags = 1
[server]
rounds = 3
cohort = 20
[system]
workers = 1
"""
