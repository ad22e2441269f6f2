"""What a node's folder says without torch: which users it hosts, and who may use it now.

`fedssl.client_round.write_shard` lays the folder out: ``histories/``, ``users.npy`` (the users' stable numbers) and
``node.json``; training adds ``heads/``. A device of one user is a folder of one.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import DataError


def users_of(folder: Path) -> NDArray[np.int64]:
    """Stable numbers of the users a node hosts, (U,), sorted. Raises DataError for a folder that is not a node's."""
    path = folder / "users.npy"
    try:
        users: NDArray[np.int64] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as the numbers of a node's users ({error}); is the folder in `store` a node's?") from None
    if users.dtype != np.int64 or users.ndim != 1 or not len(users) or users[0] < 0 or not (np.diff(users) > 0).all():
        raise DataError(f"{path}: wanted numbers from 0, each once and sorted; lay the node's folder out again")
    return users


def allowed_parts(folder: Path) -> set[str]:
    """Parts of other packages (``module:name``) that the node's owner lets a recipe name: "parts" in node.json, none where it is missing."""
    try:
        parts = json.loads((folder / "node.json").read_text()).get("parts", [])
        return {str(name) for name in parts}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{folder / 'node.json'}: cannot be read ({error}); lay the node's folder out again") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone: a second process waits, so heads are never written by two at once. Ends with the process, however it ends."""
    try:
        file = (folder / "lock").open("a")
    except OSError as error:
        raise DataError(f"{folder}: not a folder this node may write to ({error}); `store` in --node-config names it") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
