"""Personal heads on disk: one vector a user, and a journal that can take back what abandoned rounds did.

Heads live where their users live and are in no record that leaves. The server may go back to an older checkpoint; then
the heads must go back too. So before a head changes, its old value is appended to the journal with the round; a round n
that begins anew takes back all that rounds >= n did. Entries that a durable checkpoint has settled are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import CheckpointError

HEADS_FORMAT = 1


class HeadStore:
    """Vectors of ``width`` float32 for the given users (sorted stable numbers), zero until trained. Memory-mapped.

    Guarantees:
      - after `begin(n)`, the users' heads are what they were before round n was first begun, however often the process
        was killed between any two writes;
      - users of other stores are not touched.
    """

    def __init__(self, folder: Path, users: NDArray[np.int64], width: int):
        self._folder, self.users, self.width = folder, users, width
        self._entry = np.dtype([("round", "<i8"), ("place", "<i8"), ("old", "<f4", (width,))])
        folder.mkdir(parents=True, exist_ok=True)
        # Which users, not only how many: else one user's head could become another's.
        about = {"format": HEADS_FORMAT, "users": len(users), "width": width, "whose": _digest(users)}
        path, meta = folder / "user-vector.f32", folder / "heads.json"
        if meta.exists():
            try:
                found = json.loads(meta.read_text())
            except ValueError:
                found = None
            if found != about or not path.exists() or path.stat().st_size != len(users) * width * 4:
                raise CheckpointError(f"{folder}: these heads are {found}, this run has {about}; use another folder, or the run that made them")
        else:
            # A sparse file of zeros: a million heads that nobody trained take no space.
            with path.open("wb") as file:
                file.truncate(len(users) * width * 4)
            beside = meta.with_suffix(".new")
            beside.write_text(json.dumps(about))
            os.replace(beside, meta)
        self._heads = np.memmap(path, dtype="<f4", mode="r+", shape=(len(users), width)) if len(users) else np.zeros((0, width), dtype=np.float32)
        self._journal = folder / "journal.bin"
        self._entries = self._read_journal()
        self._first = int(self._entries["round"].min(initial=np.iinfo(np.int64).max))

    def begin(self, round: int, *, settled: int) -> None:
        """Take back what rounds >= ``round`` did; forget the way back beyond ``settled``. Idempotent."""
        if len(self._entries) == 0 or (self._first > settled and self._entries["round"].max() < round):
            return
        undone = self._entries["round"] >= round
        # Oldest value last, so that it wins.
        for entry in self._entries[undone][::-1]:
            self._heads[entry["place"]] = entry["old"]
        if undone.any():
            self.flush()
        kept = self._entries[~undone & (self._entries["round"] > settled)]
        beside = self._journal.with_suffix(".new")
        with beside.open("wb") as file:
            file.write(kept.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._journal)
        self._entries = kept
        self._first = int(kept["round"].min(initial=np.iinfo(np.int64).max))

    def read(self, users_U: NDArray[np.int64]) -> NDArray[np.float32]:
        """The heads of these users, a copy. Shape: (U, width)."""
        return np.asarray(self._heads[self._places(users_U)], dtype=np.float32)

    def write(self, users_U: NDArray[np.int64], heads_UD: NDArray[np.float32], *, round: int) -> None:
        """Change heads in ``round``: the old values reach the journal before the new ones reach the file."""
        places = self._places(users_U)
        entries = np.empty(len(places), dtype=self._entry)
        entries["round"], entries["place"], entries["old"] = round, places, self._heads[places]
        with self._journal.open("r+b" if self._journal.exists() else "wb") as file:
            # Behind the last whole entry: what a full disk cut short is written over.
            file.truncate(len(self._entries) * self._entry.itemsize)
            file.seek(0, os.SEEK_END)
            file.write(entries.tobytes())
        self._entries = np.concatenate([self._entries, entries])
        self._first = min(self._first, round)
        self._heads[places] = heads_UD

    def flush(self) -> None:
        """Write what the operating system still holds to the disk."""
        if isinstance(self._heads, np.memmap):
            self._heads.flush()

    def _places(self, users_U: NDArray[np.int64]) -> NDArray[np.int64]:
        places = np.searchsorted(self.users, users_U)
        assert len(users_U) == 0 or (places.max() < len(self.users) and np.array_equal(self.users[places], users_U))
        return places

    def _read_journal(self) -> NDArray[np.void]:
        if not self._journal.exists():
            return np.zeros(0, dtype=self._entry)
        raw = self._journal.read_bytes()
        whole = len(raw) // self._entry.itemsize * self._entry.itemsize
        if whole < len(raw):
            # A torn last entry: the process ended inside the append, so its heads were not changed yet.
            with self._journal.open("r+b") as file:
                file.truncate(whole)
        return np.frombuffer(raw[:whole], dtype=self._entry).copy()


def _digest(users: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(users, dtype="<i8").data).hexdigest()[:16]
