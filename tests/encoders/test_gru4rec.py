"""GRU4Rec over padded windows of many users equals torch's GRU over each window without padding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracles.loop_over_users import encode as encode_plainly
from torch import Tensor

from fedssl.config import EncoderConfig
from fedssl.encoders.gru4rec import gru4rec, recurrence
from fedssl.errors import ConfigError
from fedssl.weights import Weights

D, H = 8, 12
CONFIG = EncoderConfig(name="gru4rec", width=D, window=200, hidden=H, blocks=2)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weights_of(config: EncoderConfig, seed: int = 0) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in gru4rec(config).init(rng).items()}


def table(seed: int = 1) -> Tensor:
    return torch.randn(21, D, generator=torch.Generator().manual_seed(seed))


def encode(config: EncoderConfig, weights: Weights, rows_BL: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
    """Hidden states (B, L, D) of one user's windows."""
    return gru4rec(config).encode({name: leaf[None] for name, leaf in weights.items()}, table()[rows_BL][None], rows_BL[None] == 0, masks)[0]


def padded(rows: list[int], length: int) -> Tensor:
    return torch.tensor([[0] * (length - len(rows)) + rows])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "weights of their own"])
@pytest.mark.parametrize(("U", "B", "L"), [(3, 2, 7), (1, 1, 5), (2, 1, 1)])
def test_the_recurrence_and_its_slopes_are_those_of_torchs_gru(U: int, B: int, L: int, shared: bool):
    rng = torch.Generator().manual_seed(4)
    gates_ULBG = torch.randn(U, L, B, 3 * H, generator=rng, requires_grad=True)
    recurrent = torch.randn(1 if shared else U, H, 3 * H, generator=rng).expand(U, H, 3 * H).detach().requires_grad_()
    slope = torch.randn(U, L, B, H, generator=rng)
    before = gates_ULBG.detach().clone(), slope.clone()
    found = recurrence(gates_ULBG.view(U, L * B, 3 * H), recurrent, torch.zeros(U, L * B, dtype=torch.bool), windows=B).view(U, L, B, H)
    slopes = torch.autograd.grad(found, [gates_ULBG, recurrent], slope)
    assert torch.equal(gates_ULBG, before[0]) and torch.equal(slope, before[1])
    # torch's GRU multiplies its input; an identity lets the gates through.
    identity, none = torch.eye(3 * H), torch.zeros(3 * H)
    for user in range(U):
        own = recurrent[user].detach().clone().requires_grad_()
        mine = gates_ULBG[user].detach().clone().requires_grad_()
        wanted, _ = torch.gru(mine, torch.zeros(1, B, H), [identity, own.T, none, none], True, 1, 0.0, True, False, False)
        torch.testing.assert_close(found[user], wanted, rtol=1e-12, atol=1e-12)
        for slope_found, slope_wanted in zip(slopes, torch.autograd.grad(wanted, [mine, own], slope[user]), strict=True):
            torch.testing.assert_close(slope_found[user], slope_wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_the_state_stays_exactly_what_it_is_over_padding_and_padding_has_no_slope():
    rng = torch.Generator().manual_seed(5)
    gates = (10 * torch.randn(1, 6, 3 * H, generator=rng)).requires_grad_()
    is_padding = torch.tensor([[True, True, False, True, False, True]])
    state = recurrence(gates, torch.randn(1, H, 3 * H, generator=rng), is_padding, windows=1)[0]
    assert not state[:2].any()
    assert torch.equal(state[3], state[2]) and torch.equal(state[5], state[4]) and not torch.equal(state[4], state[2])
    (slope,) = torch.autograd.grad(state.sum(), gates)
    assert not slope[is_padding].any() and slope[~is_padding].any(1).all()


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
    hidden = gru4rec(CONFIG).encode(both, table()[rows_BL].expand(2, 1, 3, D), (rows_BL == 0).expand(2, 1, 3), ())
    for user, weights in enumerate((mine, yours)):
        torch.testing.assert_close(hidden[user, 0], encode_plainly(weights, table(), rows_BL[0], CONFIG), rtol=1e-5, atol=2e-6)


def test_the_dropout_site_takes_its_mask():
    weights, rows = weights_of(CONFIG), [3, 1, 4, 1]
    masks = 2.0 * (torch.rand(1, 1, 1, 4, D, generator=torch.Generator().manual_seed(2)) < 0.5)
    wanted = encode_plainly(weights, table(), torch.tensor(rows), CONFIG, masks[:, 0, 0])
    assert gru4rec(CONFIG).dropout_sites == 1
    torch.testing.assert_close(encode(CONFIG, weights, torch.tensor([rows]), masks.unbind(0))[0], wanted, rtol=1e-5, atol=2e-6)


def test_no_layer_is_refused():
    with pytest.raises(ConfigError, match="blocks = 0: gru4rec without a layer reads nothing; set blocks = 1"):
        gru4rec(EncoderConfig(blocks=0))
