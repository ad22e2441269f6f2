"""A log as lines of JSON, a line an event: when, what, and facts of ours beside it. Never what anybody met, and never anybody else's words.

What an exception says may quote a history or a path, and what a node says of a failure it has chosen itself; a line has the exception's kind alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

Fact = str | int | float | bool | None | dict[str, int]


class JsonLines(logging.Formatter):
    """``{"time": "2026-01-31T12:00:00.123Z", "level": "info", "log": NAME, "event": MESSAGE, ...facts, "error": KIND}``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without a line break in it."""
        when = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
        line = {"time": when, "level": record.levelname.lower(), "log": record.name, "event": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line)


def note(log: logging.Logger, event: str, **facts: Fact) -> None:
    """One line. ``event``: always the same words for the same kind of event; what differs goes into ``facts``."""
    log.info(event, extra={"facts": facts})


def note_failure(log: logging.Logger, event: str, **facts: Fact) -> None:
    """One line, of level error, with the kind of the exception at hand and none of its words."""
    log.error(event, exc_info=True, extra={"facts": facts})


@contextmanager
def logged(log: logging.Logger, to: Path | TextIO) -> Iterator[None]:
    """Write this log's lines to a file (its owner's alone, added to what is there) or a stream, while the block runs."""
    if isinstance(to, Path):
        to.touch(0o600)
        os.chmod(to, 0o600)
        handler: logging.Handler = logging.FileHandler(to, encoding="utf-8")
    else:
        handler = logging.StreamHandler(to)
    handler.setFormatter(JsonLines())
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
