"""The history on a device: durable, kept within bounds, its owner's alone, and gone without a byte when it is forgotten."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fedssl_client.history import DAY, Event, HistoryStore
from fedssl_client.policy import Retention

from fedssl.errors import DataError, DiskError

KEEP = Retention()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore(tmp_path / "store" / "history.sqlite")


def test_events_come_back_in_order_of_time_then_of_recording(store: HistoryStore):
    for item, when in (("b", 2.0), ("c", 3.0), ("a", 1.0), ("b2", 2.0), ("d", 4.0)):
        store.record(item, when, 1.0, KEEP)
        assert store.items() == [event.item for event in store.events()]
    assert store.items() == ["a", "b", "b2", "c", "d"]
    assert HistoryStore(store.path).items() == store.items()


def test_recording_the_newest_event_gives_what_came_before_it_and_an_older_one_nothing(store: HistoryStore):
    assert store.record("a", 1.0, 1.0, KEEP) == []
    assert store.record("b", 3.0, 1.0, KEEP) == ["a"]
    assert store.record("late", 2.0, 1.0, KEEP) is None
    assert store.record("c", 3.0, 1.0, KEEP) == ["a", "late", "b"]
    assert store.record("d", 4.0, 1.0, Retention(most_events=2)) == ["a", "late", "b", "c"]
    assert HistoryStore(store.path).record("e", 5.0, 1.0, KEEP) == ["c", "d"]


def test_what_another_process_records_is_seen(store: HistoryStore):
    store.record("a", 1.0, 1.0, KEEP)
    HistoryStore(store.path).add([Event("b", 2.0, 1.0)], KEEP)
    assert store.record("c", 3.0, 1.0, KEEP) == ["a", "b"]
    HistoryStore(store.path).record("older", 0.0, 1.0, KEEP)
    assert store.items() == ["older", "a", "b", "c"]


def test_what_was_recorded_survives_a_kill_at_once(tmp_path: Path):
    path = tmp_path / "history.sqlite"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fedssl_client.history import HistoryStore, Event\n"
        "from fedssl_client.policy import Retention\n"
        f"store = HistoryStore(Path({str(path)!r}))\n"
        "for number in range(20): store.record(f'item {number}', float(number), 1.0, Retention())\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert HistoryStore(path).items() == [f"item {number}" for number in range(20)]


def test_retention_keeps_the_newest_by_count_and_by_age(store: HistoryStore):
    for number in range(10):
        store.record(f"i{number}", number * DAY, 1.0, Retention(most_events=6))
    assert store.items() == [f"i{number}" for number in range(4, 10)]
    store.record("late", 10 * DAY, 1.0, Retention(most_days=2.5))
    assert store.items() == ["i8", "i9", "late"]
    # An old event that comes late is old.
    store.record("old", 1.0, 1.0, Retention(most_days=2.5))
    assert store.items() == ["i8", "i9", "late"]


def test_files_and_folder_are_their_owners_alone_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        store = HistoryStore(tmp_path / "store" / "history.sqlite")
        store.record("i", 1.0, 1.0, KEEP)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    assert {name: oct(stat.S_IMODE((tmp_path / "store" / name).stat().st_mode)) for name in files_of(tmp_path / "store")} == {
        "history.sqlite": "0o600",
        "history.sqlite-wal": "0o600",
        "history.sqlite-shm": "0o600",
    }


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_forgotten_item_is_in_no_byte_of_any_file(checkpointed: bool, store: HistoryStore):
    for number in range(300):
        store.record("SECRET-ITEM" if number % 3 == 0 else f"plain {number}", float(number), 1.0, KEEP)
    if checkpointed:
        store._file.execute("PRAGMA wal_checkpoint")
    assert any(b"SECRET-ITEM" in data for data in files_of(store.path.parent).values())
    assert store.forget("SECRET-ITEM") == 100
    assert not any(b"SECRET" in data for data in files_of(store.path.parent).values())
    assert len(store.items()) == 200
    assert store.forget("SECRET-ITEM") == 0


def test_forgetting_all_leaves_nothing_but_what_the_device_joined(store: HistoryStore):
    store.join("server")
    store.set_anchor(3, b"chain")
    for number in range(300):
        store.record(f"plain {number}", float(number), 1.0, KEEP)
    store.begin_training(1000.0)
    store.forget(None)
    assert not any(b"plain" in data for data in files_of(store.path.parent).values())
    assert store.items() == []
    assert store.trainings(1000.0) == 0
    assert store.servers() == ["server"]
    assert store.anchor() == (3, b"chain")


def test_forgetting_says_so_where_another_process_still_reads(store: HistoryStore):
    store.record("SECRET", 1.0, 1.0, KEEP)
    store._file.execute("PRAGMA busy_timeout = 50")
    reader = HistoryStore(store.path)
    reader._file.execute("BEGIN")
    reader._file.execute("SELECT * FROM events").fetchall()
    with pytest.raises(DiskError, match="forget again"):
        store.forget("SECRET")
    reader._file.execute("ROLLBACK")
    store.forget("SECRET")
    assert not any(b"SECRET" in data for data in files_of(store.path.parent).values())


def test_trainings_of_the_last_day_are_counted_also_where_a_clock_was_set_back(store: HistoryStore):
    for when in (0.0, DAY / 2, DAY):
        store.begin_training(when)
    assert store.trainings(DAY + 1) == 2
    assert store.trainings(DAY / 4) == 2


@pytest.mark.parametrize(
    ("item", "when", "value"), [("", 1.0, 1.0), ("x" * 1001, 1.0, 1.0), ("a\nb", 1.0, 1.0), ("a", float("nan"), 1.0), ("a", 1.0, float("inf"))]
)
def test_what_is_no_event_is_refused_and_nothing_is_kept(item: str, when: float, value: float, store: HistoryStore):
    with pytest.raises(DataError):
        store.record(item, when, value, KEEP)
    with pytest.raises(DataError):
        store.add([Event("good", 1.0, 1.0), Event(item, when, value)], KEEP)
    assert store.items() == []


def test_a_file_that_is_no_history_is_refused(tmp_path: Path):
    path = tmp_path / "history.sqlite"
    path.write_bytes(b"not a database, by far" * 100)
    with pytest.raises(DataError, match="cannot be read as a history"):
        HistoryStore(path)
    path.unlink()
    store = HistoryStore(path)
    store._file.execute("PRAGMA user_version = 9")
    store.close()
    with pytest.raises(DataError, match="history format 9"):
        HistoryStore(path)
