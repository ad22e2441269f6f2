"""User tokens of a store, decoded when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


class StoredNames(Sequence[str]):
    """User tokens as one block of UTF-8 and its cuts, decoded when asked for: a million names cost no Python strings."""

    def __init__(self, text: NDArray[np.uint8], cuts: NDArray[np.int64]):
        self._text, self._cuts = text, cuts

    def __len__(self) -> int:
        return len(self._cuts) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        """One name, or a tuple of those in a slice."""
        if isinstance(at, slice):
            return tuple(self[user] for user in range(*at.indices(len(self))))
        user = range(len(self))[at]  # IndexError where there is none
        return self._text[self._cuts[user] : self._cuts[user + 1]].tobytes().decode("utf-8", errors="replace")

    def between(self, first: int, end: int) -> StoredNames:
        """The names of users ``first`` to ``end`` - 1, not decoded either."""
        return StoredNames(self._text, self._cuts[first : end + 1])
