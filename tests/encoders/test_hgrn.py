"""HGRN over padded windows of many users equals a plain loop over the events of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracles.loop_over_users import encode as encode_plainly
from torch import Tensor

from fedssl.config import EncoderConfig
from fedssl.encoders.hgrn import hgrn, running_mean
from fedssl.weights import Weights

D = 8
CONFIG = EncoderConfig(name="hgrn", width=D, window=200, blocks=2)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weights_of(config: EncoderConfig, seed: int = 0) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in hgrn(config).init(rng).items()}


def table(seed: int = 1) -> Tensor:
    return torch.randn(21, D, generator=torch.Generator().manual_seed(seed))


def encode(config: EncoderConfig, weights: Weights, rows_BL: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
    """Hidden states (B, L, D) of one user's windows."""
    return hgrn(config).encode({name: leaf[None] for name, leaf in weights.items()}, table()[rows_BL][None], rows_BL[None] == 0, masks)[0]


def padded(rows: list[int], length: int) -> Tensor:
    return torch.tensor([[0] * (length - len(rows)) + rows])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("U", "B", "L"), [(3, 2, 7), (1, 1, 5), (2, 1, 1)])
def test_the_running_mean_and_its_slopes_are_those_of_a_plain_loop(U: int, B: int, L: int):
    rng = torch.Generator().manual_seed(4)
    forget, value = (torch.randn(U, L, B, D, generator=rng, requires_grad=True) for _ in range(2))
    slope = torch.randn(U, L, B, D, generator=rng)
    before = [x.detach().clone() for x in (forget, value, slope)]
    found = running_mean(forget.view(U, L * B, D), value.view(U, L * B, D), windows=B).view(U, L, B, D)
    slopes = torch.autograd.grad(found, [forget, value], slope)
    assert all(torch.equal(x, y) for x, y in zip((forget, value, slope), before, strict=True))
    state, states = torch.zeros(U, B, D), []
    for t in range(L):
        keep = torch.sigmoid(forget[:, t])
        state = keep * state + (1 - keep) * value[:, t]
        states.append(state)
    wanted = torch.stack(states, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(slopes, torch.autograd.grad(wanted, [forget, value], slope), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_a_mean_worked_by_hand():
    """Gates of 1/2: 4, then 2 + 4 = 6, then, over padding, still 6, then 3 - 1 = 2."""
    value = torch.tensor([8.0, 8.0, 99.0, -2.0]).view(1, 4, 1)
    forget = torch.tensor([0.0, 0.0, 1e9, 0.0]).view(1, 4, 1)
    assert running_mean(forget, value, windows=1).flatten().tolist() == [4.0, 6.0, 6.0, 2.0]


@pytest.mark.parametrize("rows", [[3], [3, 1, 4, 1, 5], [7, 0, 2, 0, 9]], ids=["one item", "five items", "gaps"])
def test_padding_to_10_50_and_200_columns_changes_nothing(rows: list[int]):
    weights = weights_of(CONFIG)
    wanted = encode_plainly(weights, table(), torch.tensor(rows), CONFIG)
    for length in (len(rows), 10, 50, 200):
        torch.testing.assert_close(encode(CONFIG, weights, padded(rows, length))[0, length - len(rows) :], wanted, rtol=1e-5, atol=2e-6)


def test_the_company_of_other_windows_changes_nothing():
    weights = weights_of(CONFIG)
    rows_BL = torch.cat([padded([3, 1, 4], 9), padded(list(range(1, 10)), 9), padded([], 9)])
    together = encode(CONFIG, weights, rows_BL)
    assert together.isfinite().all()
    torch.testing.assert_close(together[0, -3:], encode(CONFIG, weights, padded([3, 1, 4], 3))[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together[1], encode(CONFIG, weights, rows_BL[1:2])[0], rtol=1e-6, atol=1e-6)


def test_no_position_reads_a_later_one():
    weights = weights_of(CONFIG)
    before, after = encode(CONFIG, weights, torch.tensor([[3, 1, 4, 1, 5, 9]])), encode(CONFIG, weights, torch.tensor([[3, 1, 4, 8, 2, 7]]))
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.isclose(before[0, 3:], after[0, 3:]).any(0).all()


def test_users_with_weights_of_their_own_read_with_their_own():
    mine, yours = weights_of(CONFIG, seed=0), weights_of(CONFIG, seed=5)
    rows_BL = torch.tensor([[3, 1, 4]])
    both = {name: torch.stack([mine[name], yours[name]]) for name in mine}
    hidden = hgrn(CONFIG).encode(both, table()[rows_BL].expand(2, 1, 3, D), (rows_BL == 0).expand(2, 1, 3), ())
    for user, weights in enumerate((mine, yours)):
        torch.testing.assert_close(hidden[user, 0], encode_plainly(weights, table(), rows_BL[0], CONFIG), rtol=1e-5, atol=2e-6)


def test_each_dropout_site_takes_a_mask_of_its_own():
    weights, rows = weights_of(CONFIG), [3, 1, 4, 1]
    masks = 2.0 * (torch.rand(3, 1, 1, 4, D, generator=torch.Generator().manual_seed(2)) < 0.5)
    wanted = encode_plainly(weights, table(), torch.tensor(rows), CONFIG, masks[:, 0, 0])
    assert hgrn(CONFIG).dropout_sites == 3
    torch.testing.assert_close(encode(CONFIG, weights, torch.tensor([rows]), masks.unbind(0))[0], wanted, rtol=1e-5, atol=2e-6)


def test_no_block_leaves_normalised_item_vectors():
    config = CONFIG.model_copy(update={"blocks": 0})
    weights = weights_of(config)
    torch.testing.assert_close(encode(config, weights, torch.tensor([[3, 1]]))[0], encode_plainly(weights, table(), torch.tensor([3, 1]), config))
