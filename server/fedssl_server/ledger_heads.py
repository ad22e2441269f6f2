"""The newest head of each node's ledger of uploads, kept by the server: a device cannot see that its whole disk was put back, who knows it from outside can.

A head is a number of rows and a keyed hash of them all: it says how often a device wrote something down, and nothing of what. A device that is told the
server's holds its ledger against it before it trains; the server holds what comes back against what it knows. A device that lost its ledger
joins as a new node, with a key of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedssl.disk import write_whole
from fedssl.errors import RunFolderError, UploadRefused
from fedssl.wire import LedgerHead


class LedgerHeads:
    """The heads in ``path``, by Flower's number of the node. Raises RunFolderError where there is a file that cannot be read."""

    def __init__(self, path: Path):
        self.path, self._is_new = path, False
        try:
            stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            self._heads = {int(node): (int(rows), bytes.fromhex(chain)) for node, (rows, chain) in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{path}: cannot be read ({error}); put it back, or remove it and trust every device's ledger as it comes next") from None

    def known(self, node: int) -> LedgerHead | None:
        """The newest head of a node; None where it never sent one."""
        return self._heads.get(node)

    def take(self, node: int, head: LedgerHead | None) -> None:
        """Know a head that came with an answer. Raises UploadRefused, of kind ledger, where it is older than the one before, or there is none any more.

        As many rows as before are right where the answer was kept and left again: then they are the same rows.
        """
        before = self._heads.get(node)
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
            self._heads[node], self._is_new = head, True

    def save(self) -> None:
        """Write down what is new, whole and synced. Raises DiskError."""
        if self._is_new:
            write_whole(self.path, json.dumps({str(node): [rows, chain.hex()] for node, (rows, chain) in sorted(self._heads.items())}))
            self._is_new = False
