"""The ledger of a node whose users add their own noise: what each was charged, and what was answered, on disk before anything leaves.

A question is all that an answer depends on beside the user's data: run, phase, round, attempt, exchange, recipe, clip and weights.
It is charged before the data is read, and its answer is kept before it leaves:

- asked again, the kept bytes leave, and nothing is charged: the server learns nothing new, whatever has changed here since;
- charged but never answered (a crash): nothing has left, so the same noise may be drawn over what is there now;
- another question is another upload: charged, with noise of its own.

A device that joins a run whose noise the server adds is charged that run's whole epsilon at once, asked or not. Such epsilons are added up.

Uploads with noise add up to one Gaussian: a user's sum of 1/z^2. Uploads that protect single training windows are counted apart, as steps of
a rate and a noise: what they say of the whole user is not bounded here, while an upload that protects the user protects each window
too. Each row carries an HMAC of itself and the row before, with
the node's key, so a row that was changed or taken out is seen; that the whole file is of yesterday is not.
SQLite, in which a commit is on disk before it returns (WAL, synchronous = FULL).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.disk import erase_deleted, writing
from fedssl.errors import BudgetSpent, DataError, DiskError, LedgerBehind, WireError
from fedssl.privacy import accounting
from fedssl.privacy.keys import read_device_key, write_device_key
from fedssl.records import Address, Download

UPLOADS_FORMAT = 2
_TABLES = """
CREATE TABLE uploads (number INTEGER PRIMARY KEY, kind TEXT, question TEXT, run TEXT, phase TEXT, round INTEGER, users BLOB, cost REAL,
    rate REAL, steps INTEGER, chain BLOB) STRICT;
CREATE TABLE answers (question TEXT PRIMARY KEY, run TEXT, round INTEGER, upload BLOB) STRICT;
"""


_UNKNOWN = "what these users have spent is unknown, so nothing is trained. Put the node's own ledger back"


def question_of(download: Download) -> str:
    """SHA-256 of what an answer depends on. Not of who is asked: a user draws the same noise alone and among others."""
    tensors = sorted(download.tensors.items())
    told = [vars(download.address), download.recipe.hash, download.clip_norm, [[name, str(array.dtype), array.shape] for name, array in tensors]]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for _, array in tensors:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class UploadLedger:
    """The uploads of a node's users, in ``path``. ``key``: the node's own, 32 bytes.

    ``may_be_new``: whether there may be no file yet. Raises DataError where there is none against that, and for a file that
    was not written with this key, that was changed, or of another format.
    """

    def __init__(self, path: Path, key: bytes, *, may_be_new: bool):
        is_new = not path.exists()
        if is_new and not may_be_new:
            raise DataError(f"{path} is missing; {_UNKNOWN}")
        self.path, self._key = path, key
        self._cost: defaultdict[int, float] = defaultdict(float)
        self._steps: defaultdict[int, dict[tuple[float, float], int]] = defaultdict(dict)
        self._charged: dict[str, bytes] = {}
        self._answered: set[str] = set()
        self._joined: dict[str, float] = {}
        self._runs: dict[str, str] = {}
        self._chain, self._number = b"", 0
        try:
            if is_new:
                with writing(path):
                    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.execute("PRAGMA secure_delete = ON")
            if is_new or not self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._file.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {UPLOADS_FORMAT}; COMMIT;")
            form = self._file.execute("PRAGMA user_version").fetchone()[0]
            rows = self._file.execute(
                "SELECT number, kind, question, run, phase, round, users, cost, rate, steps, chain FROM uploads ORDER BY number"
            ).fetchall()
        except sqlite3.Error as error:
            raise DataError(f"{path}: cannot be read as a ledger of uploads ({error}); {_UNKNOWN}") from None
        if form != UPLOADS_FORMAT:
            raise DataError(f"{path}: ledger format {form}, this version reads {UPLOADS_FORMAT}; install the fedssl that wrote it")
        for *values, chain in rows:
            if values[0] != self._number + 1 or not hmac.compare_digest(chain, self._link(values)):
                raise DataError(f"{path}, row {self._number + 1}: not what this node wrote; {_UNKNOWN}")
            self._believe(values, chain)

    def charge(
        self,
        question: str,
        address: Address,
        users: NDArray[np.int64],
        *,
        cost: float,
        promised: float | None,
        delta: float,
        rate: float = 1.0,
        steps: int = 0,
    ) -> None:
        """Charge an upload of ``users`` to each of them, on disk before this returns; a question that was charged is not charged again.

        ``cost``: 1/z^2 of the upload, where z is the noise over the sensitivity. Where windows are protected, that of each of its ``steps``
        steps, in which every window is read with chance ``rate``; 0 steps: the user is protected. Raises BudgetSpent where one of them would
        have spent more than ``promised`` (None: no bound), and WireError for a question that was asked of other users before, or
        was answered so long ago that the answer is no longer kept.
        """
        asked = np.ascontiguousarray(users, dtype="<i8").tobytes()
        before = self._charged.get(question)
        if before is not None:
            if before != asked:
                raise WireError("this question was asked of other users before; a new attempt is needed, so that no noise is drawn over two sums")
            if question in self._answered and self.answer(question) is None:
                raise WireError("this question was answered, and a checkpoint held it, so the answer is no longer kept; it is not drawn anew")
            return
        if promised is not None:
            if steps:
                histories = {tuple(self.window_events(int(user))) for user in users}
                spent = max((accounting.epsilon([*history, (rate, cost**-0.5, steps)], delta) for history in histories), default=0.0)
            else:
                worst = max((self._cost[int(user)] for user in users), default=0.0) + cost
                spent = accounting.gaussian_epsilon(worst**-0.5, 1, delta)
            if spent > promised * (1 + 1e-9):
                raise BudgetSpent(spent=spent, promised=promised, round_number=address.round)
        self._write("charge", question, address, asked, cost, rate=rate, steps=steps)

    def answer(self, question: str) -> bytes | None:
        """The kept answer; None where there is none."""
        found = self._file.execute("SELECT upload FROM answers WHERE question = ?", (question,)).fetchone()
        return None if found is None else bytes(found[0])

    def kept_answers(self) -> tuple[int, int]:
        """How many answers are kept for a retry, and their bytes."""
        number, size = self._file.execute("SELECT count(*), coalesce(sum(length(upload)), 0) FROM answers").fetchone()
        return int(number), int(size)

    def keep(self, question: str, address: Address, upload: bytes) -> bytes:
        """Keep an answer before it leaves, and return what may leave: the answer that was kept first."""
        kept = self.answer(question)
        if kept is not None:
            return kept
        if question not in self._charged or question in self._answered:
            raise AssertionError("an answer leaves only once, and only to a question that was charged")
        self._write("answer", question, address, self._charged[question], 0.0, upload)
        return upload

    def forget(self, run: str, settled: int) -> None:
        """Drop the answers up to training round ``settled`` of a run: a checkpoint holds them, and nobody asks again."""
        try:
            self._file.execute("DELETE FROM answers WHERE run = ? AND round <= ?", (run, settled))
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: answers that nobody asks for again cannot be dropped ({error}), so nothing leaves; check space and rights") from None

    def forget_answers(self, *, but_of: str | None = None) -> None:
        """Drop all answers, or all but those of one run: they say much of the data. Their questions are not answered again; charges stay.

        Nothing of them is left in the files. Raises DiskError where that could not be; then do it again.
        """
        try:
            self._file.execute("DELETE FROM answers WHERE run IS NOT ?", (but_of,))
        except sqlite3.Error as error:
            raise DiskError(f"{self.path}: kept answers cannot be dropped ({error}); make room and do it again") from None
        erase_deleted(self._file, self.path)

    def join(self, run: str, *, epsilon: float, delta: float, recipe: str) -> None:
        """Charge a run's whole promise, on disk before this returns; once a run. ``recipe``: the hash of what it promised.

        Raises WireError for a run that was joined under another recipe.
        """
        before = self._runs.get(run)
        if before is None:
            self._write("join", recipe, Address(run, "", 0), b"", epsilon, rate=delta)
        elif before != recipe:
            raise WireError("this run was joined under another recipe; a run keeps its recipe, so this is another run and needs another name")

    def joined(self) -> dict[str, float]:
        """Epsilon of each run that was joined; inf for one without a plan."""
        return dict(self._joined)

    @property
    def head(self) -> tuple[int, bytes]:
        """How many rows there are, and the chain of the last one: who keeps it elsewhere sees a ledger of yesterday (`check_holds`)."""
        return self._number, self._chain

    def check_holds(self, number: int, chain: bytes) -> None:
        """Raises LedgerBehind where row ``number`` is not there, or is another: the file was put back to an older one."""
        found = self._file.execute("SELECT chain FROM uploads WHERE number = ?", (number,)).fetchone()
        if number and (found is None or not hmac.compare_digest(found[0], chain)):
            raise LedgerBehind(
                f"{self.path}: {self._number} rows, and not the one numbered {number} that was there before; the ledger was put back to an older one, "
                "what was spent since is unknown, so nothing is trained. Put the newest one back"
            )

    def spent(self, user: int, delta: float) -> float:
        """Epsilon, for the user, of all that was sent so far to protect users."""
        cost = self._cost.get(user, 0.0)
        return accounting.gaussian_epsilon(cost**-0.5, 1, delta) if cost else 0.0

    def window_events(self, user: int) -> list[tuple[float, float, int]]:
        """(rate, noise multiplier, steps) of all that a user has sent so far, as it covers one window. Uploads that protect the user are one step at rate 1."""
        events = [(rate, cost**-0.5, steps) for (rate, cost), steps in sorted(self._steps[user].items())]
        return [*events, (1.0, self._cost[user] ** -0.5, 1)] if self._cost[user] else events

    def uploads(self) -> dict[int, int]:
        """How often each user was charged."""
        found: defaultdict[int, int] = defaultdict(int)
        for users in self._charged.values():
            for user in np.frombuffer(users, dtype="<i8"):
                found[int(user)] += 1
        return dict(found)

    def check_not_behind(self, uploads: Mapping[int, int]) -> None:
        """Raises DataError where a user was charged less often than a checkpoint says that they uploaded: rows were lost."""
        known = self.uploads()
        for user, count in uploads.items():
            if known.get(user, 0) < count:
                raise DataError(
                    f"{self.path}: {known.get(user, 0)} uploads of user {user}, and the checkpoint knows of {count}; the ledger is behind, "
                    "and what was spent since is unknown. Put the node's own ledger back, or start a new run"
                )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(
        self, kind: str, question: str, address: Address, users: bytes, cost: float, upload: bytes | None = None, *, rate: float = 1.0, steps: int = 0
    ) -> None:
        values = [self._number + 1, kind, question, address.run, address.phase, address.round, users, cost, rate, steps]
        chain = self._link(values)
        try:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, chain))
            if upload is not None:
                self._file.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", (question, address.run, address.round, upload))
            self._file.execute("COMMIT")
        except sqlite3.Error as error:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise DataError(f"{self.path}: an upload could not be written down ({error}), so nothing leaves; check space and rights") from None
        self._believe(values, chain)

    def _believe(self, values: list[Any], chain: bytes) -> None:
        self._number, kind, question, run, _, _, users, cost, rate, steps = values
        self._chain = chain
        if kind == "join":
            self._joined[run], self._runs[run] = cost, question
            return
        if kind == "answer":
            self._answered.add(question)
            return
        self._charged[question] = users
        for user in np.frombuffer(users, dtype="<i8"):
            if steps:
                own = self._steps[int(user)]
                own[rate, cost] = own.get((rate, cost), 0) + steps
            else:
                self._cost[int(user)] += cost

    def _link(self, values: list[Any]) -> bytes:
        text = json.dumps([value.hex() if isinstance(value, bytes | float) else value for value in values])
        return hmac.new(self._key, b"fedssl upload\0" + self._chain + text.encode(), hashlib.sha256).digest()


@dataclass(frozen=True)
class Device:
    """What a node's users need to add noise of their own: its key, never sent or shown, and its ledger of uploads."""

    key: bytes = field(repr=False)
    ledger: UploadLedger


def open_device(folder: Path) -> Device:
    """Key and ledger of a node's folder, made where it has neither. Call it with the folder held alone.

    Raises DataError where one of both is missing or was changed: what its users have spent is then unknown.
    """
    path, key = folder / "uploads.sqlite", read_device_key(folder)
    if key is not None:
        return Device(key, UploadLedger(path, key, may_be_new=False))
    # The ledger first: a crash between both leaves an empty one, and no row of another key passes.
    UploadLedger(path, b"", may_be_new=True).close()
    key = write_device_key(folder)
    return Device(key, UploadLedger(path, key, may_be_new=False))
