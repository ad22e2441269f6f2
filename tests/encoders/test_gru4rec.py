"""GRU4Rec's recurrence and the slopes that are written out for it are those of torch's GRU."""

from __future__ import annotations

import pytest
import torch

from fedssl.config import EncoderConfig
from fedssl.encoders.gru4rec import gru4rec, recurrence
from fedssl.errors import ConfigError

H = 12


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


def test_no_layer_is_refused():
    with pytest.raises(ConfigError, match="blocks = 0: gru4rec without a layer reads nothing; set blocks = 1"):
        gru4rec(EncoderConfig(blocks=0))
