"""The sum of many sparse matrices, each added as it arrives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedssl.records import Ints, SparseSum


class SparseTotal:
    """The exact sum of what was added so far: any order and any grouping give the same bytes.

    What arrives waits until it has as many cells as the sum itself, and is merged then. So time grows with the cells that arrive (times the
    logarithm of sorting), not with their number times the sum's, and memory holds at most twice the sum and one arrival.
    """

    def __init__(self, first: SparseSum):
        self._sum, self._waiting, self._cells = first, list[SparseSum](), 0

    def add(self, value: SparseSum) -> None:
        """Add one more matrix of the same shape."""
        self._waiting.append(value)
        self._cells += len(value.values)
        if self._cells > len(self._sum.values):
            self.sum()

    def sum(self) -> SparseSum:
        """The sum of all that was added, in int64."""
        self._sum = merge([self._sum, *self._waiting])
        self._waiting, self._cells = [], 0
        return self._sum


def merge(parts: Sequence[SparseSum]) -> SparseSum:
    """The sum of matrices of one shape. Values are int64."""
    stride = parts[0].shape[1]
    return from_keys(*sum_by_key([part.rows.astype(np.int64) * stride + part.columns for part in parts], [part.values for part in parts]), parts[0].shape)


def sum_by_key(keys: Sequence[NDArray[np.int64]], values: Sequence[Ints]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct keys (from 0), sorted, and the sum of the values of each. Shapes: of each piece (cells,), both alike."""
    if not keys:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key, value = np.concatenate(keys), np.concatenate(values).astype(np.int64)
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return key[first], np.add.reduceat(value, first) if len(first) else value


def from_keys(key: NDArray[np.int64], values: NDArray[np.int64], shape: tuple[int, int]) -> SparseSum:
    """The matrix of cells whose keys, sorted, are row * columns + column."""
    rows, columns = np.divmod(key, shape[1])
    return SparseSum(rows.astype(np.int32), columns.astype(np.int32), values, shape)
