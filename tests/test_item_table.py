"""The rows users hold: looked up like an embedding, with slopes that add up beside autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.item_table import ItemTable

U, K, D = 2, 5, 3
IDS = torch.tensor([[1, 1, 4, 0], [2, 3, 2, 2]])


def rows(seed: int = 0) -> Tensor:
    return torch.randn(U, K, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "own"])
def test_rows_are_looked_up_as_embeddings_are_with_the_same_slope(is_shared: bool):
    rows_UKD = rows()[:1].expand(U, K, D) if is_shared else rows()
    table = ItemTable(rows_UKD)
    upstream = torch.randn(U, 4, D, dtype=torch.float64)
    found = table.look_up(IDS)
    (found * upstream).sum().backward()
    for user in range(U):
        own = rows_UKD[user].detach().clone().requires_grad_()
        wanted = F.embedding(IDS[user], own, padding_idx=0)
        (wanted * upstream[user]).sum().backward()
        assert torch.equal(found[user].detach(), wanted.detach())
        torch.testing.assert_close(table.finish()[user], own.grad)


def test_slopes_from_several_places_add_up_and_that_of_row_0_is_exactly_0():
    table = ItemTable(rows())
    (table.look_up(IDS).sum() + 2 * table.look_up(IDS[:, :1]).sum()).backward()
    table.add_slope_at(torch.tensor([[0, 3], [3, 3]]), torch.full((U, 2, D), 10.0, dtype=torch.float64))
    table.add_slope(torch.full((U, K, D), 100.0, dtype=torch.float64))
    # Row 1 of user 0: read twice, and once more with factor 2.
    assert table.finish()[0, :, 0].tolist() == [0, 104, 100, 110, 101]
    assert table.finish()[1, :, 0].tolist() == [0, 100, 105, 121, 100]


def test_a_table_that_nobody_read_has_a_slope_of_zero():
    assert torch.equal(ItemTable(rows()).finish(), torch.zeros(U, K, D, dtype=torch.float64))


def test_gathered_rows_have_no_slope():
    table = ItemTable(rows())
    assert torch.equal(table.gather(IDS)[1, 0], rows()[1, 2])
    assert not table.gather(IDS).requires_grad


def test_a_table_ranks_all_where_no_candidates_were_drawn():
    assert ItemTable(rows()).ranks_all
    assert not ItemTable(rows(), bias_UN=torch.zeros(U, K - 1)).ranks_all
