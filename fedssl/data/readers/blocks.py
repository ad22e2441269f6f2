"""Blocks of events: what the reader of a format yields, what is done with a line that cannot be read, and columns made of blocks.

A reader is a generator, so that a file larger than memory can be read once, a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedssl.data.interactions import Interactions
from fedssl.errors import DataError


class Block(NamedTuple):
    """Some events in file order: tokens as text, none of them empty; ``times`` (events,), finite, or None where the file has no times."""

    users: Sequence[str]
    items: Sequence[str]
    times: NDArray[np.float64] | None


@dataclass
class BadLines:
    """Lines that cannot be read: the first one stops the reading, or, where ``skip``, they are counted and passed over.

    ``unit``: what a number counts, `line` or `row`. ``first``: the message of the first one, with file and line.
    """

    path: Path
    skip: bool = False
    unit: str = "line"
    count: int = field(default=0, init=False)
    first: str = field(default="", init=False)

    def add(self, number: int, reason: str) -> None:
        """Note one line. Raises DataError with file, line and reason where bad lines are not skipped."""
        message = f"{self.path}, {self.unit} {number}: {reason}"
        if not self.skip:
            raise DataError(message)
        self.count += 1
        self.first = self.first or message


def check_events(numbers: Sequence[int], users: Sequence[str], items: Sequence[str], times: Sequence[str] | None, bad: BadLines) -> Block:
    """A block of columns of text; events without a user or an item, or with a time that is not a finite number, go to ``bad``."""
    values = None if times is None else _floats(times)
    if "" not in users and "" not in items and (times is None or values is not None):
        return Block(users, items, values)
    kept = []
    for at, number in enumerate(numbers):
        reason = reason_against(users[at], items[at], None if times is None else times[at])
        if reason:
            bad.add(number, reason)
        else:
            kept.append(at)
    return Block(
        [users[at] for at in kept],
        [items[at] for at in kept],
        None if times is None else np.array([float(times[at]) for at in kept], dtype=np.float64),
    )


def reason_against(user: str, item: str, time: str | None) -> str:
    """Why an event is none, or nothing."""
    if not user or not item:
        return f"an empty {'item' if user else 'user'} token; give every event a user and an item"
    if time is not None and not _is_finite(time):
        return f"timestamp {time[:60]!r} is not a finite number; seconds since 1970 are usual"
    return ""


def collect(blocks: Iterable[Block], bad: BadLines, nothing: str) -> Interactions:
    """All blocks as columns; tokens are coded in order of first appearance. Raises DataError, saying ``nothing``, where no event is left."""
    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    users, items, times = [], [], []
    for block in blocks:
        users.append(_encode(block.users, user_codes))
        items.append(_encode(block.items, item_codes))
        if block.times is not None:
            times.append(block.times)
    if not user_codes:
        raise DataError(f"{bad.path}: none of its {bad.count} {bad.unit}s can be read; the first: {bad.first}" if bad.count else f"{bad.path}: {nothing}")
    return Interactions(
        users=np.concatenate(users),
        items=np.concatenate(items),
        times=np.concatenate(times) if times else None,
        user_tokens=tuple(user_codes),
        item_tokens=tuple(item_codes),
        bad_lines=bad.count,
        first_bad=bad.first,
    )


def _encode(column: Sequence[str], codes: dict[str, int]) -> NDArray[np.int64]:
    return np.fromiter((codes.setdefault(token, len(codes)) for token in column), np.int64, len(column))


def _floats(column: Sequence[str]) -> NDArray[np.float64] | None:
    """The numbers of a column of text; None where one of them is not finite."""
    try:
        values = np.array(list(map(float, column)), dtype=np.float64)
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
