"""What holds for every encoder that ships: over padded windows of many users it equals a plain one over each window without padding."""

from __future__ import annotations

import pytest
import torch
from encoding import D, encode, make, padded, table, weights_of
from oracles.loop_over_users import encode as encode_plainly

from fedssl.config import EncoderConfig
from fedssl.parts import ENCODERS

SIZES = {"width": D, "window": 200, "hidden": 12, "heads": 2, "blocks": 2}
every_encoder = pytest.mark.parametrize("config", [EncoderConfig(name=name, **SIZES) for name in ENCODERS], ids=list(ENCODERS))
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@every_encoder
@pytest.mark.parametrize("rows", [[3], [3, 1, 4, 1, 5], [7, 0, 2, 0, 9]], ids=["one item", "five items", "gaps"])
def test_padding_to_10_50_and_200_columns_changes_nothing(rows: list[int], config: EncoderConfig):
    weights = weights_of(config)
    wanted = encode_plainly(weights, table(), torch.tensor(rows), config)
    for length in (len(rows), 10, 50, 200):
        torch.testing.assert_close(encode(config, weights, padded(rows, length))[0, length - len(rows) :], wanted, **CLOSE)


@every_encoder
def test_the_company_of_other_windows_changes_nothing(config: EncoderConfig):
    weights = weights_of(config)
    rows_BL = torch.cat([padded([3, 1, 4], 9), padded(list(range(1, 10)), 9), padded([], 9)])
    together = encode(config, weights, rows_BL)
    assert together.isfinite().all()
    torch.testing.assert_close(together[0, -3:], encode(config, weights, padded([3, 1, 4], 3))[0], **CLOSE)
    torch.testing.assert_close(together[1], encode(config, weights, rows_BL[1:2])[0], **CLOSE)


@every_encoder
def test_a_position_reads_later_ones_only_where_the_encoder_says_so(config: EncoderConfig):
    weights = weights_of(config)
    before, after = encode(config, weights, torch.tensor([[3, 1, 4, 1, 5, 9]])), encode(config, weights, torch.tensor([[3, 1, 4, 8, 2, 7]]))
    assert torch.equal(before[0, :3], after[0, :3]) == make(config).is_causal
    assert not torch.isclose(before[0, 3:], after[0, 3:]).any(0).all()


@every_encoder
def test_users_with_weights_of_their_own_read_with_their_own(config: EncoderConfig):
    mine, yours = weights_of(config, seed=0), weights_of(config, seed=5)
    rows_BL = torch.tensor([[3, 1, 4]])
    both = {name: torch.stack([mine[name], yours[name]]) for name in mine}
    hidden = make(config).encode(both, table()[rows_BL].expand(2, 1, 3, D), (rows_BL == 0).expand(2, 1, 3), ())
    for user, weights in enumerate((mine, yours)):
        torch.testing.assert_close(hidden[user, 0], encode_plainly(weights, table(), rows_BL[0], config), **CLOSE)


@every_encoder
def test_each_dropout_site_takes_a_mask_of_its_own(config: EncoderConfig):
    weights, rows, sites = weights_of(config), [3, 1, 4, 1], make(config).dropout_sites
    assert sites == {"sasrec": 5, "gru4rec": 1, "bert4rec": 5, "hgrn": 3}[config.name]
    masks = 2.0 * (torch.rand(sites, 1, 1, 4, D, generator=torch.Generator().manual_seed(2)) < 0.5)
    wanted = encode_plainly(weights, table(), torch.tensor(rows), config, masks[:, 0, 0])
    torch.testing.assert_close(encode(config, weights, torch.tensor([rows]), masks.unbind(0))[0], wanted, **CLOSE)
    assert not torch.isclose(wanted, encode_plainly(weights, table(), torch.tensor(rows), config)).all()


@every_encoder
def test_first_weights_are_a_function_of_the_generator(config: EncoderConfig):
    one, two, other = (make(config).init(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
