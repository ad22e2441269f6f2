"""First item vectors from counts: close where items share their company, random where nothing was counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedssl.counts import Counts, from_cells
from fedssl.spectral import positive_information, spectral_items

D = 3


def counts_of(cells: dict[tuple[int, int], float], num_items: int) -> Counts:
    rows, columns = (np.array(side, dtype=np.int32) for side in zip(*cells, strict=True))
    return from_cells(rows, columns, np.array(list(cells.values())), num_items=num_items)


def random_table(num_items: int) -> Tensor:
    table = torch.randn(num_items + 1, D, generator=torch.Generator().manual_seed(3)) * 0.05
    table[0] = 0.0
    return table


def two_groups(size: int = 12) -> Counts:
    """Items 1 .. size follow one another, and so do size + 1 .. 2 size; item 2 size + 1 was never counted."""
    rng = np.random.default_rng(0)
    cells = {(int(i) + group * size, int(j) + group * size): 1.0 for group in (0, 1) for i, j in rng.integers(1, size + 1, (80, 2)) if i != j}
    return counts_of(cells, 2 * size + 1)


def test_positive_information_by_hand():
    """Symmetrised: (1, 2) 4, (2, 3) 4 of a total of 16; item 2 has 8, the others 4."""
    found = positive_information(counts_of({(1, 2): 4.0, (3, 2): 4.0}, 3)).to_dense()
    wanted = torch.zeros(4, 4)
    wanted[1, 2] = wanted[2, 1] = wanted[2, 3] = wanted[3, 2] = math.log(4 * 16 / (4 * 8))
    torch.testing.assert_close(found, wanted)


def test_what_is_less_frequent_than_chance_has_information_zero():
    found = positive_information(counts_of({(1, 2): 10.0, (3, 4): 10.0, (1, 3): 0.1}, 4)).to_dense()
    assert found[1, 3] == found[3, 1] == 0.0
    assert found[1, 2] > 0


def test_products_of_the_vectors_are_the_information_at_full_rank():
    counts = two_groups(3)
    information = positive_information(counts).to_dense().double()
    size = len(information)
    random = torch.ones(size, size)
    vectors = spectral_items(counts, random, seed=1).double()
    values = torch.linalg.svdvals(information)
    # U S U^T is |M|: for a symmetric M the root of its square.
    eigen, basis = torch.linalg.eigh(information)
    magnitude = basis @ torch.diag(eigen.abs()) @ basis.T
    counted = slice(1, 7)
    scale = float(magnitude[counted, counted].trace() / (vectors[counted] @ vectors[counted].T).trace())
    torch.testing.assert_close(vectors[counted] @ vectors[counted].T * scale, magnitude[counted, counted], atol=1e-3 * float(values[0]), rtol=0)


def test_items_of_one_company_begin_closer_than_others():
    vectors = torch.nn.functional.normalize(spectral_items(two_groups(), random_table(25), seed=1)[1:25], dim=1)
    alike = vectors @ vectors.T
    within = (alike[:12, :12].sum() - 12 + alike[12:, 12:].sum() - 12) / (2 * 12 * 11)
    assert within > alike[:12, 12:].mean() + 0.3


def test_an_item_without_a_count_stays_random_and_the_padding_zero():
    random = random_table(25)
    found = spectral_items(two_groups(), random, seed=1)
    assert torch.equal(found[25], random[25])
    assert (found[0] == 0).all()


def test_the_spread_is_that_of_the_random_table():
    random = random_table(25)
    found = spectral_items(two_groups(), random, seed=1)
    assert float(found[1:25].square().mean()) == pytest.approx(float(random[1:].square().mean()), rel=1e-5)


def test_no_counts_leave_the_random_table():
    empty = Counts(np.zeros(5, dtype=np.int64), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32))
    assert torch.equal(spectral_items(empty, random_table(3), seed=1), random_table(3))


def test_the_same_bytes_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(spectral_items(two_groups(), random_table(25), seed=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert not torch.equal(found[0], spectral_items(two_groups(), random_table(25), seed=2))
