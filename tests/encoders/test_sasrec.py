"""What is SASRec's own: positions from the right, as many blocks and heads as asked for."""

from __future__ import annotations

import pytest
import torch
from encoding import D, encode, padded, table, weights_of
from oracles.loop_over_users import encode as encode_plainly

from fedssl.config import EncoderConfig
from fedssl.encoders.sasrec import sasrec

CONFIG = EncoderConfig(width=D, window=200, hidden=12, heads=2, blocks=2)


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


def test_norms_begin_with_a_gain_of_one():
    assert sasrec(CONFIG).init(torch.Generator().manual_seed(1))["block0.norm1.gain"].unique().tolist() == [1.0]
