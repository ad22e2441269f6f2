"""The run's two secrets, and who takes part in a round.

Under a plan the cohort is drawn from a secret key, because amplification by sampling needs a cohort that nobody who sees
the models can know. Without a plan it comes from the run's seed, and anybody may recompute it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedssl import seeds
from fedssl.disk import sync
from fedssl.errors import DataError, RunFolderError
from fedssl.privacy.stream import open_stream

KEY_BYTES = 32
_FILES = ("cohort.key", "noise.key")
_USERS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Keys:
    """32 bytes of the operating system's entropy each. Never printed, never in a report, a download or `run.toml`."""

    cohort: bytes = field(repr=False)
    noise: bytes = field(repr=False)


def make_keys(folder: Path) -> Keys:
    """New keys in ``folder``/secrets (0700), files 0600: both or none, on disk before this returns.

    Raises RunFolderError when the folder is missing or holds keys already: overwritten keys could not be resumed with.
    """
    target = folder / "secrets"
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder to make keys in; create the run folder first")
    if target.exists():
        raise RunFolderError(f"{target}: keys exist already and are never overwritten; resume that run, or start one in another folder")
    beside = None
    try:
        beside = Path(tempfile.mkdtemp(prefix=".secrets-", dir=folder))  # 0700
        for name in _FILES:
            descriptor = os.open(beside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
        sync(beside)
        os.rename(beside, target)  # Fails where another process was faster: a folder with files is never replaced.
    except OSError as error:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        raise RunFolderError(f"{target}: keys could not be written ({error}); check space and rights, and that no other run starts here") from error
    sync(folder)
    return read_keys(folder)


def read_keys(folder: Path) -> Keys:
    """The keys of a run. Raises RunFolderError when they are missing, of another length, or open to other people."""
    target = folder / "secrets"
    for path in (target, *(target / name for name in _FILES)):
        if not path.exists():
            raise RunFolderError(f"{path} is missing; a run under a privacy plan resumes only with its own keys, start a new run")
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise RunFolderError(f"{path}: mode {mode:04o} lets others in; nobody but its owner may: chmod go= {path}")
    cohort, noise = ((target / name).read_bytes() for name in _FILES)
    for name, key in zip(_FILES, (cohort, noise), strict=True):
        if len(key) != KEY_BYTES:
            raise RunFolderError(f"{target / name}: {len(key)} bytes instead of {KEY_BYTES}; it is not the key this run was made with, start a new run")
    return Keys(cohort=cohort, noise=noise)


def draw_cohort(key: bytes, phase: str, round: int, attempt: int, num_users: int, rate: float) -> NDArray[np.int64]:
    """Who takes part: a secret coin a user, keyed by (cohort key, phase, round, attempt). Sorted user numbers.

    Guarantees:
      - each user is chosen independently, with a chance at most ``rate`` and short of it by less than 2^-64;
      - a rate of 1 chooses everybody, and nobody may be chosen at all: an empty cohort is a round of noise alone;
      - another attempt is another cohort, and a user's coin does not depend on how many users there are.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a cohort needs a rate in (0, 1], not {rate}")
    if rate == 1:
        return np.arange(num_users, dtype=np.int64)
    draw = open_stream(key, "cohort", phase, round, attempt)
    threshold = np.uint64(int(rate * 2.0**64))
    chosen = [first + np.flatnonzero(draw(min(_USERS_AT_ONCE, num_users - first)) < threshold) for first in range(0, num_users, _USERS_AT_ONCE)]
    return np.concatenate([np.empty(0, dtype=np.int64), *chosen])


def users_per_round(cohort: float, num_users: int) -> int:
    """How many users a round of a pass has, where ``cohort`` was asked for."""
    return max(1, min(round(cohort), num_users))


def read_device_key(folder: Path) -> bytes | None:
    """The key of a node's folder, in ``device.key``; None where it has none yet. Raises DataError for another length, or where others may read it."""
    path = folder / "device.key"
    if not path.exists():
        return None
    key, mode = path.read_bytes(), path.stat().st_mode & 0o777
    if len(key) != KEY_BYTES or mode & 0o077:
        raise DataError(f"{path}: {len(key)} bytes, mode {mode:04o}; wanted {KEY_BYTES} bytes that only their owner may read. Put the node's own key back")
    return key


def write_device_key(folder: Path) -> bytes:
    """A new key of a node's folder, 0600, on disk before this returns. Call it with the folder held alone, where there is none."""
    beside = folder / ".device.key.new"
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        key = secrets.token_bytes(KEY_BYTES)
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, folder / "device.key")
    sync(folder)
    return key


def cohort_of_pass(seed: int, users_per_round: int, num_users: int, round: int) -> NDArray[np.int64]:
    """Without a plan, sampling = passes: each user exactly once a pass, in a shuffled order. Sorted user numbers.

    A pass has ceil(num_users / users_per_round) rounds, and its last round the users that are left over; so no round
    spans two passes and none holds a user twice. ``round`` counts from 1. The order is keyed by (seed, pass).
    """
    if users_per_round < 1 or round < 1:
        raise ValueError(f"users_per_round {users_per_round} and round {round} count from 1")
    rounds_in_pass = -(-num_users // users_per_round)
    number, slot = divmod(round - 1, rounds_in_pass)
    order_U = _order_of_pass(seed, number, num_users)
    return np.sort(order_U[slot * users_per_round : (slot + 1) * users_per_round])


def cohort_by_coins(seed: int, rate: float, num_users: int, round: int, phase: str) -> NDArray[np.int64]:
    """Without a plan, sampling = poisson: a coin a user, keyed by (seed, phase, round). Sorted user numbers.

    Everybody who knows the seed knows this cohort: no amplification may be claimed for it.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a cohort needs a rate in (0, 1], not {rate}")
    return np.flatnonzero(_uniform(seeds.key(seed, "cohort", phase, round), num_users) < rate)


@lru_cache(maxsize=2)
def _order_of_pass(seed: int, number: int, num_users: int) -> NDArray[np.int64]:
    return np.argsort(_uniform(seeds.key(seed, "pass", number), num_users), kind="stable")


def _uniform(base: int, num_users: int) -> NDArray[np.float64]:
    users_U = np.arange(num_users, dtype=np.int64)
    return seeds.uniform(seeds.keys_of_users(base, users_U), 1)[:, 0]
