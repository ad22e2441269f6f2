"""HGRN's running mean and the slopes that are written out for it are those of a plain loop."""

from __future__ import annotations

import pytest
import torch
from encoding import D, encode, table, weights_of
from oracles.loop_over_users import encode as encode_plainly

from fedssl.config import EncoderConfig
from fedssl.encoders.hgrn import running_mean

CONFIG = EncoderConfig(name="hgrn", width=D, window=200, blocks=2)


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


def test_no_block_leaves_normalised_item_vectors():
    config = CONFIG.model_copy(update={"blocks": 0})
    weights = weights_of(config)
    torch.testing.assert_close(encode(config, weights, torch.tensor([[3, 1]]))[0], encode_plainly(weights, table(), torch.tensor([3, 1]), config))
