"""BERT4Rec over padded windows of many users equals torch's attention over each window without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoding import D, table, weights_of
from oracles.loop_over_users import encode as encode_plainly
from torch import Tensor

from fedssl.config import EncoderConfig, RunConfig, TaskConfig
from fedssl.encoders.bert4rec import bert4rec
from fedssl.item_table import ItemTable
from fedssl.local_training import UsersModel
from fedssl.parts import initial_weights
from fedssl.recipe import make_recipe
from fedssl.recommender import Recommender
from fedssl.weights import ITEMS, Weights

WINDOW = 60
CONFIG = EncoderConfig(name="bert4rec", width=D, window=WINDOW, hidden=12, heads=2, blocks=2)


def model_of(*weights: Weights) -> UsersModel:
    """Users with these weights and one table."""
    both = {name: torch.stack([own[name] for own in weights]) for name in weights[0]}
    return UsersModel(bert4rec(CONFIG), both, ItemTable(table()[None].expand(len(weights), 21, D)), None, None)


def padded(rows: list[int], length: int) -> Tensor:
    """One user's one window. Shape: (1, 1, length)."""
    return torch.tensor([[[0] * (length - len(rows)) + rows]])


HIDDEN = -1
"""In a test's window: a place that hides an item."""


@pytest.mark.parametrize(
    "rows",
    [[HIDDEN], [3, 1, HIDDEN, 1, 5], [HIDDEN, 2, HIDDEN], [7, 0, 2, 0, HIDDEN]],
    ids=["one mask", "a mask inside", "masks at both ends", "gaps"],
)
def test_padding_to_10_50_and_61_columns_changes_nothing(rows: list[int]):
    weights = weights_of(CONFIG)
    items_L, hidden_L = torch.tensor(rows).clamp(min=0), torch.tensor(rows) == HIDDEN
    wanted = encode_plainly(weights, table(), items_L, CONFIG, hidden_L=hidden_L)
    for length in (len(rows), 10, 50, WINDOW + 1):
        whole = padded(rows, length)
        found = model_of(weights).encode(whole.clamp(min=0), whole == HIDDEN)[0, 0, length - len(rows) :]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_the_company_of_other_windows_and_users_changes_nothing_and_users_read_with_their_own_weights():
    mine, yours = weights_of(CONFIG, seed=0), weights_of(CONFIG, seed=5)
    rows_UBL = torch.cat([torch.cat([padded([3, 1, 0], 9), padded(list(range(1, 10)), 9), padded([], 9)], 1)] * 2)
    is_hidden_UBL = torch.zeros_like(rows_UBL, dtype=torch.bool)
    is_hidden_UBL[:, 0, -1] = True
    together = model_of(mine, yours).encode(rows_UBL, is_hidden_UBL)
    assert together.isfinite().all()
    for user, weights in enumerate((mine, yours)):
        short = encode_plainly(weights, table(), torch.tensor([3, 1, 0]), CONFIG, hidden_L=torch.tensor([False, False, True]))
        torch.testing.assert_close(together[user, 0, -3:], short, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(together[user, 1], encode_plainly(weights, table(), torch.arange(1, 10), CONFIG), rtol=1e-5, atol=2e-6)


def test_every_position_reads_later_ones_but_never_the_item_that_is_hidden():
    weights = weights_of(CONFIG)
    one, other = (model_of(weights).encode(torch.tensor([[[3, 1, newest]]]))[0, 0] for newest in (4, 9))
    assert not torch.isclose(one[0], other[0]).all()
    is_hidden = torch.tensor([[[False, False, True]]])
    one, other = (model_of(weights).encode(torch.tensor([[[3, 1, newest]]]), is_hidden)[0, 0] for newest in (4, 9))
    assert torch.equal(one, other)


def test_what_follows_is_read_at_a_mask_behind_the_newest_event():
    weights = weights_of(CONFIG)
    rows = torch.tensor([[[3, 1, 4], [0, 0, 7]]])
    found = model_of(weights).after(rows)[0]
    for window, events in enumerate(([3, 1, 4], [7])):
        is_hidden = torch.tensor([False] * len(events) + [True])
        wanted = encode_plainly(weights, table(), torch.tensor([*events, 0]), CONFIG, hidden_L=is_hidden)[-1]
        torch.testing.assert_close(found[window], wanted, rtol=1e-5, atol=2e-6)


def test_a_recommendation_reads_the_newest_window_of_events_and_a_mask():
    config = CONFIG.model_copy(update={"window": 4})
    recipe = make_recipe(RunConfig(encoder=config, task=(TaskConfig(name="masked-item"),)), num_items=20, catalogue="")
    rng = torch.Generator().manual_seed(2)
    weights = {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in initial_weights(recipe).items()}
    assert weights["positions"].shape == (5, D)
    histories = [np.array([9, 8, 3, 1, 4, 5]), np.array([2]), np.array([], dtype=np.int64)]
    scores = Recommender(recipe, weights)(histories, np.arange(3))["score"]
    for place, events in enumerate(([3, 1, 4, 5], [2])):
        is_hidden = torch.tensor([False] * len(events) + [True])
        hidden_LD = encode_plainly(weights, weights[ITEMS], torch.tensor([*events, 0]), config, hidden_L=is_hidden)
        torch.testing.assert_close(scores[place], weights[ITEMS] @ hidden_LD[-1], rtol=1e-4, atol=1e-5)
    assert not scores[2].any()


def test_positions_count_from_the_mask_behind_the_newest_event():
    weights = weights_of(CONFIG)
    before = model_of(weights).after(torch.tensor([[[5]]]))
    weights["positions"][:-2] += 1.0
    assert torch.equal(model_of(weights).after(torch.tensor([[[5]]])), before)
    weights["positions"][-2] += torch.randn(D, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(model_of(weights).after(torch.tensor([[[5]]])), before)


def test_the_mask_is_a_weight_and_takes_a_column_of_its_own():
    one, other = (bert4rec(CONFIG).init(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(one["mask"], other["mask"]) and one["mask"].shape == (D,)
    assert not bert4rec(CONFIG).is_causal and bert4rec(CONFIG).columns(WINDOW) == WINDOW + 1
