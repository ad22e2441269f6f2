"""The server's ledger of attempts: what was charged, written down before anything is drawn.

One JSON object a line, only ever appended, on disk (fsync) before the call returns; every line carries a hash of all
before it. A round is charged BEFORE its cohort is drawn; the totals are sealed (HMAC) after folding, BEFORE noise is drawn.

After a crash, an attempt may be played again, same cohort and same noise, under one rule (`may_draw_noise`): noise is
drawn only over the very totals that were sealed, or over totals of an attempt that was never sealed.

- Sealed, and the totals are equal: the same bytes are released as before the crash; nobody learns anything new. A
  simulation repeats exactly, so it always comes out here, and a resume is equal byte for byte.
- Sealed, and the totals differ (a deployment, where who answers in time does not repeat): the old noise may be out
  already, and equal noise over other totals would subtract to raw data. A NEW attempt is charged, with a new cohort and
  new noise; the old one stays charged.
- Never sealed: noise is drawn only after a seal is on disk, so no noise was ever drawn for this attempt and nothing of
  it was released. To repeat it with the same cohort is sound in a deployment too: its coins were flipped once and
  will have been used for one release, which is what was charged. What the aborted try uploaded was seen by the server
  alone, which is trusted, and is thrown away. (Coins flipped anew would make a second Poisson round, so that is a
  charge; that a crash happened is seen either way, and is taken not to depend on who was chosen.)
- A resume from an older checkpoint plays later rounds again from models that may differ; their seals then do not match,
  and each of them becomes a new attempt. Affordable or refused, but never free.

A ledger that was changed, or that knows less than a checkpoint does, is refused: what was spent would be unknown.
Two servers on one folder cannot both draw: each append finds the file as this process left it, or refuses.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedssl.disk import sync
from fedssl.errors import RunFolderError
from fedssl.privacy.plan import Plan
from fedssl.records import SparseSum

LEDGER_FORMAT = 1


class Ledger:
    """The attempts of one run, in ``path`` (ledger.jsonl of the run folder). Opening reads; only a charge or a seal writes.

    A torn last line (a crash inside an append, so nothing was drawn for it) is dropped. Raises RunFolderError for any
    other line that is not what was written, for another format number, and for a file that another process changed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._charged: dict[str, int] = {}
        self._last: dict[tuple[str, int], int] = {}
        self._seals: dict[tuple[str, int, int, int], str] = {}
        self._plan: str | None = None
        self._chain = ""
        raw = path.read_bytes() if path.exists() else b""
        self._seen = len(raw)  # Bytes on disk, a torn line included
        self._good = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[: self._good].splitlines(), start=1):
            entry = self._read(line, number)
            if (number == 1) != (entry["kind"] == "ledger"):
                raise self._corrupt(number, "the first line, and only it, names the format")
            self._apply(entry, number)

    def charge(self, phase: str, round: int) -> int:
        """Charge one more attempt of a round and return its number (from 0 in each round). On disk before this returns."""
        last = self._last.get((phase, round))
        attempt = 0 if last is None else last + 1
        self._append({"kind": "charge", "phase": phase, "round": round, "attempt": attempt})
        return attempt

    def seal(self, phase: str, round: int, attempt: int, totals_hmac: str, *, exchange: int = 0) -> None:
        """Write down what the totals were. On disk before this returns; the same seal again is no news.

        AssertionError for an attempt that is not its round's newest, or was sealed over other totals: ask `may_draw_noise`.
        """
        if self._last.get((phase, round)) != attempt:
            raise AssertionError(f"{phase} round {round}: attempt {attempt} is not the newest charged, {self._last.get((phase, round))}")
        before = self.sealed(phase, round, attempt, exchange=exchange)
        if before is None:
            self._append({"kind": "seal", "phase": phase, "round": round, "attempt": attempt, "exchange": exchange, "hmac": totals_hmac})
        elif before != totals_hmac:
            raise AssertionError(f"{phase} round {round} attempt {attempt} was sealed over other totals")

    def sealed(self, phase: str, round: int, attempt: int, *, exchange: int = 0) -> str | None:
        """The seal of an attempt's totals; None: never sealed, so no noise was ever drawn for it."""
        return self._seals.get((phase, round, attempt, exchange))

    def last_attempt(self, phase: str, round: int) -> int | None:
        """The newest attempt of a round that may still be played again; None: a new one must be charged."""
        return self._last.get((phase, round))

    def charged(self) -> dict[str, int]:
        """Attempts charged so far, a phase."""
        return dict(self._charged)

    def check_not_behind(self, charged: Mapping[str, int]) -> None:
        """Raises RunFolderError where a checkpoint says that more was charged than is written here: lines were lost, and what they charged is unknown."""
        for phase, count in charged.items():
            if count > self._charged.get(phase, 0):
                raise RunFolderError(
                    f"{self.path}: {self._charged.get(phase, 0)} attempts of phase '{phase}', and the checkpoint knows of {count}; the ledger is behind, "
                    "and what was spent since is unknown. Put the run's own ledger back, or start a new run"
                )

    def bind(self, plan: str) -> None:
        """Hold this ledger to one plan (its fingerprint). Raises RunFolderError when it was charged under another one."""
        if self._plan is None:
            self._append({"kind": "plan", "plan": plan})
        elif self._plan != plan:
            raise RunFolderError(
                f"{self.path}: attempts were charged under another privacy plan (noise, clip, rate, rounds or users differ); "
                "resume with the run's own settings and data, or start a new run"
            )

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            chain = entry.pop("chain")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._corrupt(number, "not a line that was written here") from None
        if chain != self._link(entry):
            raise self._corrupt(number, "its hash does not follow from the lines before it")
        self._chain = chain
        return dict(entry)

    def _apply(self, entry: dict[str, Any], number: int) -> None:
        match entry:
            case {"kind": "ledger", "format": int(form)}:
                if form != LEDGER_FORMAT:
                    raise RunFolderError(f"{self.path}: ledger format {form}, this version reads {LEDGER_FORMAT}; resume with the fedssl that wrote it")
            case {"kind": "plan", "plan": str(plan)}:
                self._plan = plan
            case {"kind": "charge", "phase": str(phase), "round": int(round), "attempt": int(attempt)}:
                self._charged[phase] = self._charged.get(phase, 0) + 1
                self._last[phase, round] = attempt
            case {"kind": "seal", "phase": str(phase), "round": int(round), "attempt": int(attempt), "exchange": int(exchange), "hmac": str(totals_hmac)}:
                self._seals[phase, round, attempt, exchange] = totals_hmac
            case _:
                raise self._corrupt(number, "no kind of entry that is known here")

    def _append(self, entry: dict[str, Any]) -> None:
        """Write one line durably, then believe it."""
        try:
            is_new = not self.path.exists()
            with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = file.seek(0, os.SEEK_END)
                if size != self._seen:
                    raise RunFolderError(f"{self.path}: {size} bytes where this process left {self._seen}; another process runs here, stop one")
                if self._good == 0:
                    head = {"kind": "ledger", "format": LEDGER_FORMAT}
                    self._write(file, head)
                self._write(file, entry)
            if is_new:
                sync(self.path.parent)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: the attempt could not be written down ({error}), nothing is drawn; check space and rights, then resume"
            ) from error
        self._apply(entry, 0)

    def _write(self, file: Any, entry: dict[str, Any]) -> None:
        chain = self._link(entry)
        line = json.dumps({**entry, "chain": chain}, separators=(",", ":")).encode() + b"\n"
        file.truncate(self._good)  # Cuts off a torn line, if there is one.
        file.seek(self._good)
        file.write(line)
        file.flush()
        self._seen = self._good + len(line)
        os.fsync(file.fileno())
        self._good, self._chain = self._seen, chain

    def _link(self, entry: Mapping[str, Any]) -> str:
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{self._chain}{text}".encode()).hexdigest()[:16]

    def _corrupt(self, number: int, why: str) -> RunFolderError:
        return RunFolderError(f"{self.path}, line {number}: {why}; the ledger is corrupt and what was spent is unknown, start a new run")


def begin_attempt(ledger: Ledger, phase: str, round: int, *, plan: Plan) -> tuple[int, bool]:
    """The attempt under which to run a round, and whether it is one that a crash left behind and that is played again.

    A new attempt is first checked against the promise (BudgetSpent), then charged. Draw the cohort only after this returns.
    """
    ledger.bind(plan.fingerprint)
    attempt = ledger.last_attempt(phase, round)
    if attempt is not None:
        return attempt, True
    return new_attempt(ledger, phase, round, plan=plan), False


def new_attempt(ledger: Ledger, phase: str, round: int, *, plan: Plan) -> int:
    """Charge another attempt of a round, after `may_draw_noise` said no. Raises BudgetSpent, and then charges nothing."""
    ledger.bind(plan.fingerprint)
    plan.check_affordable(ledger.charged(), phase, round)
    return ledger.charge(phase, round)


def may_draw_noise(ledger: Ledger, phase: str, round: int, attempt: int, totals_hmac: str, *, exchange: int = 0) -> bool:
    """Whether noise of this attempt may be drawn over totals with that HMAC: seals them durably when none were sealed.

    False: other totals were sealed. Throw these away, call `new_attempt`, draw its cohort, ask again.
    """
    before = ledger.sealed(phase, round, attempt, exchange=exchange)
    if before is None:
        ledger.seal(phase, round, attempt, totals_hmac, exchange=exchange)
        return True
    return hmac.compare_digest(before, totals_hmac)


def hmac_of_totals(key: bytes, totals: Mapping[str, NDArray[Any] | SparseSum]) -> str:
    """HMAC-SHA256 of named integer totals, in hexadecimal: over names, layouts, shapes and values.

    Equal totals have equal HMACs whatever the order of names, the memory layout or the width of the integers. Without the
    key it tells nothing about them. Raises TypeError for anything but whole numbers.
    """
    mac = hmac.new(key, b"fedssl totals\0", hashlib.sha256)
    for name in sorted(totals):
        total = totals[name]
        if isinstance(total, SparseSum):
            layout, shape, arrays = "sparse", list(total.shape), [total.rows, total.columns, total.values]
        else:
            layout, shape, arrays = "dense", list(total.shape), [total]
        if any(array.dtype.kind != "i" for array in arrays):
            raise TypeError(f"total {name!r} is not made of signed whole numbers")
        # The header says how many bytes follow it, so no two dicts of totals feed the same bytes.
        header = json.dumps([name, layout, shape, [array.size for array in arrays]]).encode()
        mac.update(len(header).to_bytes(8, "little") + header)
        for array in arrays:
            mac.update(np.ascontiguousarray(array, dtype="<i8").data)
    return mac.hexdigest()
