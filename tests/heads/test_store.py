"""Heads on disk: what a round changed can be taken back, wherever the process was killed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from fedssl.errors import CheckpointError
from fedssl.heads.store import HeadStore

USERS = np.array([3, 5, 8, 13], dtype=np.int64)
WIDTH = 2
ENTRY_BYTES = 8 + 8 + 4 * WIDTH


def open_store(folder: Path) -> HeadStore:
    return HeadStore(folder, USERS, WIDTH)


def filled(value: float, users: int) -> NDArray[np.float32]:
    return np.full((users, WIDTH), value, dtype=np.float32)


def values(store: HeadStore) -> list[float]:
    return store.read(USERS)[:, 0].tolist()  # type: ignore[no-any-return]


def test_heads_begin_at_zero_and_take_no_space(tmp_path: Path):
    store = HeadStore(tmp_path, np.arange(1_000_000), 64)
    assert not store.read(np.array([0, 999_999])).any()
    assert (tmp_path / "user-vector.f32").stat().st_blocks * 512 < 1 << 20


def test_a_million_heads_that_were_all_trained_add_little_memory(tmp_path: Path):
    program = """
import sys, numpy as np, psutil
from pathlib import Path
from fedssl.heads.store import HeadStore
store = HeadStore(Path(sys.argv[1]), np.arange(1_000_000), 64)
before = psutil.Process().memory_info().rss
for first in range(0, 1_000_000, 20_000):
    store.write(np.arange(first, first + 20_000), np.full((20_000, 64), 1.0, dtype=np.float32), round=0)
    store.begin(1, settled=0)
store.flush()
rng = np.random.default_rng(0)
for number in range(1, 30):
    users = np.sort(rng.choice(1_000_000, 1000, replace=False))
    store.begin(number, settled=number - 1)
    store.write(users, store.read(users) + 1, round=number)
store.flush()
print(psutil.Process().memory_info().rss - before)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "heads")], capture_output=True, text=True, check=True)
    assert (tmp_path / "heads" / "user-vector.f32").stat().st_blocks * 512 >= 256_000_000, "all of them are on the disk"
    assert int(done.stdout) < 60_000_000, "of 256 MB"


def test_heads_that_were_written_are_read_again_by_another_process(tmp_path: Path):
    store = open_store(tmp_path)
    store.begin(1, settled=0)
    store.write(np.array([5, 13]), np.array([[1, 2], [3, 4]], dtype=np.float32), round=1)
    assert open_store(tmp_path).read(USERS).tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]


def test_what_is_read_is_a_copy(tmp_path: Path):
    store = open_store(tmp_path)
    store.read(USERS)[:] = 7
    assert values(store) == [0, 0, 0, 0]


def test_a_round_that_begins_anew_takes_back_what_it_and_later_ones_did(tmp_path: Path):
    store = open_store(tmp_path)
    for round, users in ((1, [3, 5]), (2, [5, 8]), (3, [3, 8])):
        store.begin(round, settled=0)
        store.write(np.array(users), filled(round, 2), round=round)
    assert values(store) == [3, 2, 3, 0]
    store.begin(2, settled=0)
    assert values(store) == [1, 1, 0, 0]
    store.begin(2, settled=0)
    assert values(store) == [1, 1, 0, 0]
    store.begin(1, settled=0)
    assert values(store) == [0, 0, 0, 0]


def test_a_head_changed_twice_in_a_round_goes_back_to_before_the_first(tmp_path: Path):
    store = open_store(tmp_path)
    store.begin(1, settled=0)
    store.write(np.array([3]), filled(1, 1), round=1)
    store.write(np.array([3]), filled(2, 1), round=1)
    store.begin(1, settled=0)
    assert values(store) == [0, 0, 0, 0]


def test_what_a_checkpoint_settled_is_forgotten(tmp_path: Path):
    store = open_store(tmp_path)
    for round in (1, 2, 3):
        store.begin(round, settled=0)
        store.write(np.array([3]), filled(round, 1), round=round)
    assert (tmp_path / "journal.bin").stat().st_size == 3 * ENTRY_BYTES
    store.begin(4, settled=2)
    # The one change that is left, and that two rounds were forgotten.
    assert (tmp_path / "journal.bin").stat().st_size == 2 * ENTRY_BYTES
    store.begin(3, settled=2)
    assert values(store) == [2, 0, 0, 0]


def test_heads_that_cannot_go_back_so_far_say_so_in_every_process(tmp_path: Path):
    store = open_store(tmp_path)
    for round in (1, 2, 3):
        store.begin(round, settled=0)
        store.write(np.array([3]), filled(round, 1), round=round)
    store.begin(4, settled=2)
    for opened in (store, open_store(tmp_path)):
        with pytest.raises(CheckpointError, match=r"can go back to the end of round 2 and no further, and round 2 was to begin; resume from the checkpoint of"):
            opened.begin(2, settled=1)
        assert values(opened) == [3, 0, 0, 0]
    store.begin(3, settled=2)
    store.begin(3, settled=2)
    assert values(open_store(tmp_path)) == [2, 0, 0, 0]


def test_after_a_power_loss_heads_that_reached_the_disk_alone_still_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_disk: dict[int, bytes] = {}
    heads_then: dict[int, bytes] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        about = os.fstat(descriptor)
        if stat.S_ISREG(about.st_mode):
            on_disk[about.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            heads_then[about.st_ino] = (tmp_path / "user-vector.f32").read_bytes() if (tmp_path / "user-vector.f32").exists() else b""

    monkeypatch.setattr(os, "fsync", fsync)
    store = open_store(tmp_path)
    for round, settled in ((1, 0), (2, 0), (3, 1), (4, 1)):
        store.begin(round, settled=settled)
        heads = (tmp_path / "user-vector.f32").read_bytes()
        store.write(USERS[round % 2 :: 2], filled(round, 2), round=round)
        assert heads_then[(tmp_path / "journal.bin").stat().st_ino] == heads
        before = {name: (tmp_path / name).read_bytes() for name in ("user-vector.f32", "journal.bin")}
        # The worst there can be: of the heads all that was written, of the journal what was waited for and no more.
        (tmp_path / "journal.bin").write_bytes(on_disk[(tmp_path / "journal.bin").stat().st_ino])
        survivor = open_store(tmp_path)
        survivor.begin(round, settled=settled)
        assert values(survivor) == [[0, 0, 0, 0], [0, 1, 0, 1], [2, 1, 2, 1], [2, 3, 2, 3]][round - 1]
        for name, raw in before.items():
            (tmp_path / name).write_bytes(raw)
        store = open_store(tmp_path)


def test_heads_cut_short_while_they_are_used_say_so(tmp_path: Path):
    store = open_store(tmp_path)
    os.truncate(tmp_path / "user-vector.f32", 5)
    with pytest.raises(CheckpointError, match=r"user-vector.f32: cut short while it was used"):
        store.read(USERS)


def test_nothing_is_rewritten_where_there_is_nothing_to_take_back_or_forget(tmp_path: Path):
    store = open_store(tmp_path)
    store.begin(1, settled=0)
    store.write(np.array([3]), filled(1, 1), round=1)
    before = (tmp_path / "journal.bin").stat()
    store.begin(2, settled=0)
    after = (tmp_path / "journal.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("kept_bytes", range(1, ENTRY_BYTES))
def test_a_torn_last_entry_is_dropped_and_the_next_one_fits(kept_bytes: int, tmp_path: Path):
    store = open_store(tmp_path)
    store.begin(1, settled=0)
    store.write(np.array([3]), filled(1, 1), round=1)
    whole = (tmp_path / "journal.bin").read_bytes()
    (tmp_path / "journal.bin").write_bytes(whole + whole[:kept_bytes])
    again = open_store(tmp_path)
    again.begin(2, settled=0)
    again.write(np.array([5]), filled(2, 1), round=2)
    last = open_store(tmp_path)
    last.begin(1, settled=0)
    assert values(last) == [0, 0, 0, 0]


def test_a_process_killed_between_journal_and_heads_left_them_as_they_were(tmp_path: Path):
    store = open_store(tmp_path)
    store.begin(1, settled=0)
    store.write(np.array([3, 5]), filled(1, 2), round=1)
    store.begin(2, settled=0)
    store.write(np.array([3, 5]), filled(2, 2), round=2)
    # The journal has round 2, the heads only half of it.
    with (tmp_path / "user-vector.f32").open("r+b") as file:
        file.seek(WIDTH * 4)
        file.write(filled(1, 1).tobytes())
    again = open_store(tmp_path)
    again.begin(2, settled=0)
    assert values(again) == [1, 1, 0, 0]


def test_an_append_that_failed_leaves_the_next_one_readable(tmp_path: Path):
    store = open_store(tmp_path)
    store.begin(1, settled=0)
    store.write(np.array([3]), filled(1, 1), round=1)
    # As a full disk leaves it, with the process still alive.
    with (tmp_path / "journal.bin").open("ab") as file:
        file.write(b"torn")
    store.begin(2, settled=0)
    store.write(np.array([5]), filled(2, 1), round=2)
    again = open_store(tmp_path)
    again.begin(1, settled=0)
    assert values(again) == [0, 0, 0, 0]


def test_a_journal_killed_before_its_rename_is_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(tmp_path)
    store.begin(1, settled=0)
    store.write(np.array([3]), filled(1, 1), round=1)

    class Killed(BaseException):
        pass

    def killed(source: object, target: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            store.begin(1, settled=0)
    again = open_store(tmp_path)
    again.begin(1, settled=0)
    assert values(again) == [0, 0, 0, 0]
    assert (tmp_path / "journal.bin").stat().st_size == 0


@pytest.mark.parametrize(("users", "width"), [(USERS, 3), (USERS[:3], WIDTH), (USERS + 1, WIDTH)])
def test_heads_of_another_width_or_of_other_users_are_refused(users: NDArray[np.int64], width: int, tmp_path: Path):
    open_store(tmp_path)
    with pytest.raises(CheckpointError, match="use another folder, or the run that made them"):
        HeadStore(tmp_path, users, width)


@pytest.mark.parametrize("damage", ["shorter", "missing", "no json"])
def test_damaged_heads_are_refused(damage: str, tmp_path: Path):
    open_store(tmp_path)
    match damage:
        case "shorter":
            os.truncate(tmp_path / "user-vector.f32", 5)
        case "missing":
            (tmp_path / "user-vector.f32").unlink()
        case _:
            (tmp_path / "heads.json").write_text("{")
    with pytest.raises(CheckpointError, match="these heads are"):
        open_store(tmp_path)


def test_a_store_killed_while_it_was_made_is_made_again(tmp_path: Path):
    (tmp_path / "user-vector.f32").write_bytes(b"\x01")
    assert values(open_store(tmp_path)) == [0, 0, 0, 0]


def test_a_node_without_users_has_a_store(tmp_path: Path):
    store = HeadStore(tmp_path, np.zeros(0, dtype=np.int64), WIDTH)
    store.begin(1, settled=0)
    assert store.read(np.zeros(0, dtype=np.int64)).shape == (0, WIDTH)
    store.flush()


class Rounds(RuleBasedStateMachine):
    """Rounds, checkpoints, kills and resumes in any order: after `begin(n)` heads are what they were before round n."""

    @initialize(folder=st.uuids())
    def start(self, folder: object) -> None:
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.store = open_store(self.folder)
        self.before = {1: filled(0, 4)}  # Heads before each round that may still be begun anew
        self.round, self.settled, self.counter = 1, 0, 0.0

    @rule(chosen=st.sets(st.integers(0, 3)), kill=st.sampled_from(["no", "after", "half"]))
    def play(self, chosen: set[int], kill: str) -> None:
        self.store.begin(self.round, settled=self.settled)
        heads = self.before[self.round].copy()
        assert np.array_equal(self.store.read(USERS), heads)
        places = np.array(sorted(chosen), dtype=np.int64)
        self.counter += 1
        heads[places] = self.counter
        self.store.write(USERS[places], heads[places], round=self.round)
        if kill == "half" and len(places):
            # The last of its heads did not reach the file.
            with (self.folder / "user-vector.f32").open("r+b") as file:
                file.seek(int(places[-1]) * WIDTH * 4)
                file.write(self.before[self.round][places[-1]].tobytes())
        if kill == "no":
            self.round += 1
            self.before[self.round] = heads
        else:
            self.resume()

    @rule()
    def checkpoint(self) -> None:
        self.store.flush()
        self.settled = self.round - 1

    @rule()
    def resume(self) -> None:
        self.store = open_store(self.folder)
        self.round = self.settled + 1

    @invariant()
    def begin_is_exact(self) -> None:
        if hasattr(self, "store"):
            self.store.begin(self.round, settled=self.settled)
            assert np.array_equal(self.store.read(USERS), self.before[self.round])

    def teardown(self) -> None:
        import shutil

        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
