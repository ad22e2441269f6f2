"""Sparse sums added one by one: exact, in any order, in time that grows with what arrives."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedssl import sparse_total
from fedssl.records import SparseSum
from fedssl.sparse_total import SparseTotal, merge

SHAPE = (5, 7)
Cells = dict[tuple[int, int], int]
matrices = st.lists(st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 6)), st.integers(-(2**40), 2**40), max_size=9), min_size=1, max_size=12)


def sparse(cells: Cells, shape: tuple[int, int] = SHAPE) -> SparseSum:
    places = sorted(cells)
    rows, columns = (np.array([place[axis] for place in places], dtype=np.int32) for axis in (0, 1))
    return SparseSum(rows, columns, np.array([cells[place] for place in places], dtype=np.int64), shape)


@given(parts=matrices, seed=st.integers(0, 100))
def test_the_sum_is_that_of_every_cell_in_any_order(parts: list[Cells], seed: int):
    expected: Counter[tuple[int, int]] = Counter()
    for part in parts:
        expected.update(part)
    order = np.random.default_rng(seed).permutation(len(parts))
    total = SparseTotal(sparse(parts[order[0]]))
    for place in order[1:]:
        total.add(sparse(parts[place]))
    found = total.sum()
    places = sorted(expected)
    assert list(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == places
    assert found.values.tolist() == [expected[place] for place in places]
    assert (found.rows.dtype, found.columns.dtype, found.values.dtype, found.shape) == (np.int32, np.int32, np.int64, SHAPE)


def test_sums_beyond_32_bits_are_exact():
    part = SparseSum(np.array([1], np.int32), np.array([2], np.int32), np.array([2**31 - 1], np.int32), SHAPE)
    assert merge([part, part, part]).values.tolist() == [3 * (2**31 - 1)]


def test_it_may_be_asked_between_and_goes_on():
    total = SparseTotal(sparse({(0, 1): 1}))
    total.add(sparse({(0, 1): 2, (3, 3): 5}))
    assert total.sum().values.tolist() == [3, 5]
    total.add(sparse({(0, 0): 7}))
    assert total.sum().values.tolist() == [7, 3, 5]


def test_thousands_of_uploads_sort_a_few_times_the_cells_that_arrive(monkeypatch: pytest.MonkeyPatch):
    shape, sorted_cells, rng = (2000, 2000), [0], np.random.default_rng(0)

    def counted(parts: list[SparseSum]) -> SparseSum:
        sorted_cells[0] += sum(len(part.values) for part in parts)
        return merge(parts)

    monkeypatch.setattr(sparse_total, "merge", counted)
    parts = [sparse(dict.fromkeys(zip(rng.integers(2000, size=20).tolist(), rng.integers(2000, size=20).tolist(), strict=True), 1), shape) for _ in range(3000)]
    total = SparseTotal(parts[0])
    for part in parts[1:]:
        total.add(part)
    cells = sum(len(part.values) for part in parts)
    assert int(total.sum().values.sum()) == cells
    # Merged with every upload, it would be 1500 times.
    assert sorted_cells[0] < 4 * cells
