"""The `fedssl` command, in this process."""

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
