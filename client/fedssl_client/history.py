"""The person's history on the device: what they met, when, how they liked it. SQLite; on the disk before a call returns; gone when forgotten.

Items are tokens, not rows: a catalogue that grows changes no event. Beside the events the file keeps what only belongs to them: trainings
begun, servers joined, and how far the ledger of uploads had come (`anchor`).
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fedssl.disk import erase_deleted, writing
from fedssl.errors import DataError, DiskError
from fedssl_client.policy import Retention

HISTORY_FORMAT = 1
MAX_ITEM = 1000
DAY = 86_400.0
_TABLES = """
CREATE TABLE events (number INTEGER PRIMARY KEY, item TEXT NOT NULL, time REAL NOT NULL, value REAL NOT NULL) STRICT;
CREATE INDEX in_time ON events (time, number);
CREATE TABLE trainings (time REAL NOT NULL) STRICT;
CREATE TABLE servers (name TEXT PRIMARY KEY) STRICT;
CREATE TABLE anchor (number INTEGER NOT NULL, chain BLOB NOT NULL) STRICT;
"""


class Event(NamedTuple):
    """One thing the person met. ``time``: seconds since 1970; ``value``: what the app says of it, 1 where it says nothing."""

    item: str
    time: float
    value: float


class HistoryStore:
    """The history in ``path``, made where there is none; its file and folder are their owner's alone. May be used by many threads.

    Guarantees:
      - what `record` was given is on the disk when it returns (WAL, synchronous = FULL);
      - what `forget` removed is in no byte of the files any more: pages are overwritten, the log is emptied, free pages are given back.

    Raises DataError for a file that is no history, or of a newer format; DiskError where it cannot be written.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.RLock()
        self._items: list[str] | None = None
        self._times: list[float] = []
        self._version = -1
        with writing(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives the log and its index the rights of the file.
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        try:
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "temp_store = MEMORY", "cache_size = -512"):
                self._file.execute(f"PRAGMA {pragma}")
            if not self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._file.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {HISTORY_FORMAT}; COMMIT;")
            form = self._file.execute("PRAGMA user_version").fetchone()[0]
            self._file.execute("SELECT count(*) FROM events").fetchone()
        except sqlite3.Error as error:
            raise DataError(f"{path}: cannot be read as a history ({error}); put a copy back, or remove the file to begin an empty one") from None
        if form != HISTORY_FORMAT:
            raise DataError(f"{path}: history format {form}, this version reads {HISTORY_FORMAT}; install the fedssl that wrote it")

    def record(self, item: str, when: float, value: float, retention: Retention) -> list[str] | None:
        """Keep an event, and delete what retention no longer covers. The items before it, oldest first; None where it is not the newest event.

        Raises DataError for an item that is empty, too long or not printable, or a time or value that is no number; DiskError where it cannot be kept.
        """
        check_event(item, when, value)
        with self._lock:
            items, times = self.items(), self._times
            with self._writing() as file:
                file.execute("INSERT INTO events (item, time, value) VALUES (?, ?, ?)", (item, when, value))
                deleted = self._retain(file, retention)
            # Of one time in the order they were recorded; what retention deletes are the oldest.
            place = bisect_right(times, when)
            self._items = [*items[:place], item, *items[place:]][deleted:]
            self._times = [*times[:place], when, *times[place:]][deleted:]
        return items if place == len(items) else None

    def add(self, events: list[Event], retention: Retention) -> None:
        """Keep many events: all, or none. Raises DataError and DiskError as `record`."""
        for event in events:
            check_event(*event)
        with self._writing() as file:
            file.executemany("INSERT INTO events (item, time, value) VALUES (?, ?, ?)", events)
            self._retain(file, retention)
            self._items = None

    def items(self) -> list[str]:
        """All items, oldest first. Do not change the list."""
        with self._reading() as file:
            # It changes when another process writes, as `fedssl device import --history` does beside an agent.
            version = int(file.execute("PRAGMA data_version").fetchone()[0])
            if self._items is None or version != self._version:
                events = self.events()
                self._items, self._times = [event.item for event in events], [event.time for event in events]
                self._version = version
            return self._items

    def events(self) -> list[Event]:
        """All events, oldest first; of one time in the order they were recorded."""
        with self._reading() as file:
            return [Event(*row) for row in file.execute("SELECT item, time, value FROM events ORDER BY time, number")]

    def forget(self, item: str | None) -> int:
        """Remove one item's events, or all that is the person's (events, trainings). How many events were removed.

        Raises DiskError where another process is reading, so that the log could not be emptied: forget again.
        """
        with self._writing() as file:
            if item is None:
                removed = file.execute("DELETE FROM events").rowcount
                file.execute("DELETE FROM trainings")
            else:
                removed = file.execute("DELETE FROM events WHERE item = ?", (item,)).rowcount
            self._items = None
        with self._lock:
            erase_deleted(self._file, self.path)
        return removed

    def begin_training(self, now: float) -> None:
        """Note that a training begins, for the gate that counts them."""
        with self._writing() as file:
            file.execute("DELETE FROM trainings WHERE time <= ?", (now - DAY,))
            file.execute("INSERT INTO trainings VALUES (?)", (now,))

    def trainings(self, now: float) -> int:
        """Trainings begun in the 24 hours before ``now``. One of the future counts too: a clock that was set back frees none."""
        with self._reading() as file:
            return int(file.execute("SELECT count(*) FROM trainings WHERE time > ?", (now - DAY,)).fetchone()[0])

    def training_times(self) -> list[float]:
        """When trainings began, as far as that is still kept: seconds since 1970."""
        with self._reading() as file:
            return [when for (when,) in file.execute("SELECT time FROM trainings ORDER BY time")]

    def join(self, server: str) -> None:
        """Note that the person joined a server."""
        with self._writing() as file:
            file.execute("INSERT OR IGNORE INTO servers VALUES (?)", (server,))

    def leave(self, server: str) -> bool:
        """Note that the person left; whether they had joined."""
        with self._writing() as file:
            return file.execute("DELETE FROM servers WHERE name = ?", (server,)).rowcount > 0

    def servers(self) -> list[str]:
        """Servers that the person joined."""
        with self._reading() as file:
            return [name for (name,) in file.execute("SELECT name FROM servers ORDER BY name")]

    def anchor(self) -> tuple[int, bytes] | None:
        """How many rows the ledger of uploads had, and the last one's chain, when an upload last left; None before the first."""
        with self._reading() as file:
            found = file.execute("SELECT number, chain FROM anchor").fetchone()
        return None if found is None else (int(found[0]), bytes(found[1]))

    def set_anchor(self, number: int, chain: bytes) -> None:
        """Note how far the ledger has come."""
        with self._writing() as file:
            file.execute("DELETE FROM anchor")
            file.execute("INSERT INTO anchor VALUES (?, ?)", (number, chain))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _retain(self, file: sqlite3.Connection, retention: Retention) -> int:
        """Delete what is beyond retention; how many events."""
        before = file.total_changes
        file.execute(
            "DELETE FROM events WHERE number IN (SELECT number FROM events ORDER BY time DESC, number DESC LIMIT -1 OFFSET ?)", (retention.most_events,)
        )
        if retention.most_days:
            file.execute("DELETE FROM events WHERE time < (SELECT max(time) FROM events) - ?", (retention.most_days * DAY,))
        return file.total_changes - before

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._file
            except sqlite3.Error as error:
                raise DataError(f"{self.path}: cannot be read as a history ({error}); put a copy back, or remove the file to begin an empty one") from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._file.execute("BEGIN IMMEDIATE")
                yield self._file
                self._file.execute("COMMIT")
            except BaseException as error:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                self._items = None
                if isinstance(error, sqlite3.Error):
                    raise DiskError(f"{self.path}: cannot be written ({error}); make room, or get the right to write there. What was kept still is") from None
                raise


def check_event(item: str, when: float, value: float) -> None:
    """Raises DataError for what is no event."""
    if not item or len(item) > MAX_ITEM or not item.isprintable():
        raise DataError(f"an item of {len(item)} characters, or with some that cannot be printed; wanted 1 to {MAX_ITEM} printable ones")
    if not (math.isfinite(when) and math.isfinite(value)):
        raise DataError("time and value of an event are numbers; came one that is not finite")


def now() -> float:
    """Seconds since 1970."""
    return time.time()
