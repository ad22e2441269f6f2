"""Personal heads on disk: one vector a user, and a journal that can take back what abandoned rounds did.

Heads live where their users live and are in no record that leaves. The server may go back to an older checkpoint; then
the heads must go back too. So before a head changes, its old value is appended to the journal with the round; a round n
that begins anew takes back all that rounds >= n did. Entries that a durable checkpoint has settled are dropped.

The journal is on the disk before a head changes, once a round: the system may write a changed head there at any time, and
after a power loss a head without its old value could not go back. Heads are read and written with calls, not through a
memory map, where a full disk would end the process by a signal and no error could say so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedssl.disk import sync, whole_file, write_whole, writing
from fedssl.errors import CheckpointError

HEADS_FORMAT = 1
_NOBODY = -1
"""The place in a journal's first entry where rounds were forgotten: the newest of them, and no head."""


class HeadStore:
    """Vectors of ``width`` float32 for the given users (sorted stable numbers), zero until trained, in files of ``folder``.

    Guarantees:
      - after `begin(n)`, the users' heads are what they were before round n was first begun, however often the process
        was killed, the disk was full or the power was lost between any two writes;
      - users of other stores are not touched.

    Raises CheckpointError for files of others or cut short, DiskError where they cannot be written.
    """

    def __init__(self, folder: Path, users: NDArray[np.int64], width: int):
        self._folder, self.users, self.width = folder, users, width
        self._entry = np.dtype([("round", "<i8"), ("place", "<i8"), ("old", "<f4", (width,))])
        self._path, self._journal, meta = folder / "user-vector.f32", folder / "journal.bin", folder / "heads.json"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # Which users, not only how many: else one user's head could become another's.
        about = {"format": HEADS_FORMAT, "users": len(users), "width": width, "whose": _digest(users)}
        if meta.exists():
            try:
                found = json.loads(meta.read_text())
            except ValueError:
                found = None
            if found != about or not self._path.exists() or self._path.stat().st_size != len(users) * width * 4:
                raise CheckpointError(f"{folder}: these heads are {found}, this run has {about}; use another folder, or the run that made them")
        else:
            # A sparse file of zeros: a million heads that nobody trained take no space.
            with whole_file(self._path) as beside, beside.open("wb") as file:
                file.truncate(len(users) * width * 4)
            write_whole(meta, json.dumps(about))
        self._entries: NDArray[np.void]
        self._journal_bytes: int
        self._forgotten: int
        self._first: int
        self._keep(self._read_journal())

    def begin(self, round: int, *, settled: int) -> None:
        """Take back what rounds >= ``round`` did; forget the way back beyond ``settled``. Idempotent.

        Raises CheckpointError where the way back was forgotten.
        """
        if round <= self._forgotten:
            raise CheckpointError(
                f"{self._folder}: heads can go back to the end of round {self._forgotten} and no further, and round {round} was to begin; "
                f"resume from the checkpoint of round {self._forgotten} or a later one; for a new run remove this folder"
            )
        if len(self._entries) == 0 or (self._first > settled and self._entries["round"].max() < round):
            return
        undone = self._entries["round"] >= round
        # Oldest value last, so that it wins.
        for entry in self._entries[undone][::-1]:
            self._put(entry["place"][None], entry["old"][None])
        if undone.any():
            self.flush()
        is_kept = ~undone & (self._entries["round"] > settled)
        newest = int(self._entries["round"][~undone & ~is_kept].max(initial=self._forgotten))
        forgotten = np.zeros(1 if newest else 0, dtype=self._entry)
        forgotten["round"], forgotten["place"] = newest, _NOBODY
        kept = np.concatenate([forgotten, self._entries[is_kept]])
        with whole_file(self._journal) as beside:
            beside.write_bytes(kept.tobytes())
        self._keep(kept)

    def read(self, users_U: NDArray[np.int64]) -> NDArray[np.float32]:
        """The heads of these users, a copy. Shape: (U, width)."""
        return self._get(self._places(users_U))

    def write(self, users_U: NDArray[np.int64], heads_UD: NDArray[np.float32], *, round: int) -> None:
        """Change heads in ``round``: the old values are in the journal, on the disk, before the new ones reach the file."""
        places = self._places(users_U)
        entries = np.empty(len(places), dtype=self._entry)
        entries["round"], entries["place"], entries["old"] = round, places, self._get(places)
        with writing(self._journal):
            is_new = not self._journal.exists()
            with self._journal.open("r+b" if not is_new else "wb") as file:
                # Behind the last whole entry: what a full disk cut short is written over.
                file.truncate(self._journal_bytes)
                file.seek(0, os.SEEK_END)
                file.write(entries.tobytes())
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync(self._folder)
        self._journal_bytes += entries.nbytes
        self._entries = np.concatenate([self._entries, entries])
        self._first = min(self._first, round)
        self._put(places, heads_UD)

    def flush(self) -> None:
        """Wait until the heads are on the disk."""
        with writing(self._path):
            sync(self._path)

    def _places(self, users_U: NDArray[np.int64]) -> NDArray[np.int64]:
        places = np.searchsorted(self.users, users_U)
        assert len(users_U) == 0 or (places.max() < len(self.users) and np.array_equal(self.users[places], users_U))
        return places

    def _get(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        heads = np.empty((len(places), self.width), dtype="<f4")
        with self._path.open("rb", buffering=0) as file:
            for start, end in _runs(places):
                if os.preadv(file.fileno(), [heads[start:end].data], int(places[start]) * self.width * 4) != heads[start:end].nbytes:
                    raise CheckpointError(f"{self._path}: cut short while it was used; put it back, or start a new run")
        return heads

    def _put(self, places: NDArray[np.int64], heads: NDArray[np.float32]) -> None:
        values = np.ascontiguousarray(heads, dtype="<f4")
        with writing(self._path), self._path.open("r+b", buffering=0) as file:
            for start, end in _runs(places):
                left, offset = values[start:end].tobytes(), int(places[start]) * self.width * 4
                while left:
                    # What finds no room is written in part, and the next call says why.
                    written = os.pwrite(file.fileno(), left, offset)
                    left, offset = left[written:], offset + written

    def _keep(self, journal: NDArray[np.void]) -> None:
        """Hold what a journal says: changed heads, and the newest round that it has forgotten."""
        self._journal_bytes, is_head = journal.nbytes, journal["place"] != _NOBODY
        self._forgotten = int(journal["round"][~is_head].max(initial=0))
        self._entries = journal[is_head]
        self._first = int(self._entries["round"].min(initial=np.iinfo(np.int64).max))

    def _read_journal(self) -> NDArray[np.void]:
        if not self._journal.exists():
            return np.zeros(0, dtype=self._entry)
        # What is behind the last whole entry is torn: the process ended inside the append, and its heads were not changed yet.
        raw = self._journal.read_bytes()
        return np.frombuffer(raw, dtype=self._entry, count=len(raw) // self._entry.itemsize).copy()


def _runs(places: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where places follow one another: each run's start and end in ``places``."""
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)]) if len(places) else iter(())


def _digest(users: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(users, dtype="<i8").data).hexdigest()[:16]
