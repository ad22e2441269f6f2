"""The newest head of each node's ledger of uploads, kept by the server: a device cannot see that its whole disk was put back, who knows it from outside can.

A head is a number of rows and a keyed hash of them all: it says how often a device wrote something down, and nothing of what. A device that is told the
server's holds its ledger against it before it trains; the server holds what comes back against what it knows. A device that lost its ledger
joins as a new node, with a key of its own.

Heads belong to a node's key where the server registered it: Flower gives a node another number when it is registered anew, as all are by a SuperLink
that had its state in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedssl.disk import write_whole
from fedssl.errors import ConfigError, RunFolderError, UploadRefused
from fedssl.wire import LedgerHead

NODE_KEYS = "node_keys.json"
Value = TypeVar("Value")


def noted_keys(folder: Path) -> dict[str, str]:
    """The key under which each node was registered, as `digest` has it, by Flower's number. Raises RunFolderError where the file cannot be read."""
    return read_names(folder / NODE_KEYS, str, "put it back, or remove it: it is made anew from the nodes' keys")


def note_key(folder: Path, node: str, key: str) -> None:
    """Remember the key (its `digest`) under which Flower's ``node`` was registered. Raises DiskError, and RunFolderError as `noted_keys`."""
    write_whole(folder / NODE_KEYS, json.dumps({**noted_keys(folder), node: key}))


def digest(public_key: Path) -> str:
    """SHA-256 of a public key in OpenSSH's form, whatever its comment says. Raises ConfigError where the file cannot be read."""
    try:
        return hashlib.sha256(b" ".join(public_key.read_bytes().split()[:2])).hexdigest()
    except OSError as error:
        raise ConfigError(f"{public_key}: cannot be read as a node's public key ({error}); put it there again, or remove it") from None


class LedgerHeads:
    """The heads in ``path``, by the key of the node, which ``node_keys.json`` beside it has; by Flower's number where it has none.

    Raises RunFolderError where there is a file that cannot be read.
    """

    def __init__(self, path: Path):
        self.path, self._is_new = path, False
        self._keys = noted_keys(path.parent)
        self._heads: dict[str, LedgerHead] = read_names(path, _head, "put it back, or remove it and trust every device's ledger as it comes next")

    def _key(self, node: int) -> str:
        return self._keys.get(str(node), str(node))

    def known(self, node: int) -> LedgerHead | None:
        """The newest head of a node; None where it never sent one."""
        return self._heads.get(self._key(node))

    def take(self, node: int, head: LedgerHead | None) -> None:
        """Know a head that came with an answer. Raises UploadRefused, of kind ledger, where it is older than the one before, or there is none any more.

        As many rows as before are right where the answer was kept and left again: then they are the same rows.
        """
        before = self._heads.get(self._key(node))
        if before is not None:
            if head is None:
                raise UploadRefused(
                    f"no head of its ledger came, and it had {before[0]} rows before; was the device made anew? it joins as a new node", "ledger"
                )
            if head[0] < before[0] or (head[0] == before[0] and head[1] != before[1]):
                raise UploadRefused(
                    f"its ledger has {head[0]} rows, and had {before[0]} others before: it was put back to an older one. Put the newest one back, or let the "
                    "device join as a new node",
                    "ledger",
                )
        if head is not None and head != before:
            self._heads[self._key(node)], self._is_new = head, True

    def save(self) -> None:
        """Write down what is new, whole and synced. Raises DiskError."""
        if self._is_new:
            write_whole(self.path, json.dumps({node: [rows, chain.hex()] for node, (rows, chain) in sorted(self._heads.items())}))
            self._is_new = False


def _head(stored: Any) -> LedgerHead:
    rows, chain = stored
    return int(rows), bytes.fromhex(chain)


def read_names(path: Path, value: Callable[[Any], Value], advice: str) -> dict[str, Value]:
    """A file's names and values; nothing where there is none. Raises RunFolderError, with ``advice``, where it cannot be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {str(name): value(one) for name, one in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); {advice}") from None
