"""SASRec over padded windows of many users equals a plain transformer over each window without padding."""

from __future__ import annotations

import pytest
import torch
from oracles.loop_over_users import encode as encode_plainly
from torch import Tensor

from fedssl.config import EncoderConfig
from fedssl.encoders.sasrec import sasrec
from fedssl.weights import Weights

D = 8
CONFIG = EncoderConfig(width=D, window=200, hidden=12, heads=2, blocks=2)


def weights_of(config: EncoderConfig, seed: int = 0) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in sasrec(config).init(rng).items()}


def table(seed: int = 1) -> Tensor:
    return torch.randn(21, D, generator=torch.Generator().manual_seed(seed))


def encode(config: EncoderConfig, weights: Weights, rows_BL: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
    """Hidden states (B, L, D) of one user's windows."""
    return sasrec(config).encode({name: leaf[None] for name, leaf in weights.items()}, table()[rows_BL][None], rows_BL[None] == 0, masks)[0]


def padded(rows: list[int], length: int) -> Tensor:
    return torch.tensor([[0] * (length - len(rows)) + rows])


@pytest.mark.parametrize("rows", [[3], [3, 1, 4, 1, 5], [7, 0, 2, 0, 9]], ids=["one item", "five items", "gaps"])
def test_padding_to_10_50_and_200_columns_changes_nothing(rows: list[int]):
    weights = weights_of(CONFIG)
    wanted = encode_plainly(weights, table(), torch.tensor(rows), CONFIG)
    for length in (len(rows), 10, 50, 200):
        hidden_LD = encode(CONFIG, weights, padded(rows, length))[0, length - len(rows) :]
        torch.testing.assert_close(hidden_LD, wanted, rtol=1e-5, atol=2e-6)


def test_the_company_of_other_windows_changes_nothing():
    weights = weights_of(CONFIG)
    rows_BL = torch.cat([padded([3, 1, 4], 9), padded(list(range(1, 10)), 9), padded([], 9)])
    together = encode(CONFIG, weights, rows_BL)
    assert together.isfinite().all()
    torch.testing.assert_close(together[0, -3:], encode(CONFIG, weights, padded([3, 1, 4], 3))[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(together[1], encode(CONFIG, weights, rows_BL[1:2])[0], rtol=1e-5, atol=2e-6)


def test_no_position_reads_a_later_one():
    weights = weights_of(CONFIG)
    before, after = encode(CONFIG, weights, torch.tensor([[3, 1, 4, 1, 5, 9]])), encode(CONFIG, weights, torch.tensor([[3, 1, 4, 8, 2, 7]]))
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.isclose(before[0, 3:], after[0, 3:]).any(0).all()


def test_positions_count_from_the_newest_event():
    """A window of one reads position -1 of the table: changing any other changes nothing."""
    weights = weights_of(CONFIG)
    before = encode(CONFIG, weights, torch.tensor([[5]]))
    weights["positions"][:-1] += 1.0
    assert torch.equal(encode(CONFIG, weights, torch.tensor([[5]])), before)
    weights["positions"][-1] += torch.randn(D, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(encode(CONFIG, weights, torch.tensor([[5]])), before)


@pytest.mark.parametrize(("blocks", "heads"), [(0, 1), (1, 1), (3, 4)])
def test_blocks_and_heads_are_those_asked_for(blocks: int, heads: int):
    config = EncoderConfig(width=D, window=7, hidden=5, heads=heads, blocks=blocks)
    weights, rows = weights_of(config), [2, 7, 1, 8]
    torch.testing.assert_close(
        encode(config, weights, padded(rows, 7))[0, 3:], encode_plainly(weights, table(), torch.tensor(rows), config), rtol=1e-5, atol=2e-6
    )
    assert sasrec(config).dropout_sites == 1 + 2 * blocks


def test_users_with_weights_of_their_own_read_with_their_own():
    mine, yours = weights_of(CONFIG, seed=0), weights_of(CONFIG, seed=5)
    rows_BL = torch.tensor([[3, 1, 4]])
    both = {name: torch.stack([mine[name], yours[name]]) for name in mine}
    hidden = sasrec(CONFIG).encode(both, table()[rows_BL].expand(2, 1, 3, D), (rows_BL == 0).expand(2, 1, 3), ())
    for user, weights in enumerate((mine, yours)):
        torch.testing.assert_close(hidden[user, 0], encode_plainly(weights, table(), rows_BL[0], CONFIG), rtol=1e-5, atol=2e-6)


def test_each_dropout_site_takes_a_mask_of_its_own():
    weights, rows = weights_of(CONFIG), [3, 1, 4, 1]
    masks = 2.0 * (torch.rand(5, 1, 1, 4, D, generator=torch.Generator().manual_seed(2)) < 0.5)
    wanted = encode_plainly(weights, table(), torch.tensor(rows), CONFIG, masks[:, 0, 0])
    torch.testing.assert_close(encode(CONFIG, weights, torch.tensor([rows]), masks.unbind(0))[0], wanted, rtol=1e-5, atol=2e-6)


def test_first_weights_are_a_function_of_the_generator():
    one, two, other = (sasrec(CONFIG).init(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["block1.qkv"], other["block1.qkv"])
    assert one["block0.norm1.gain"].unique().tolist() == [1.0]
