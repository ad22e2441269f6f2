"""Losses of U users at once equal torch's cross entropy for each user, in values and in slopes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.item_table import ItemTable
from fedssl.losses import POSITIONS_AT_ONCE, info_nce, softmax_loss

D, K = 4, 9
OWN = 4
"""Own items, in columns 1 to 4, where candidates were drawn: the columns after them."""
INF = math.inf


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def setting(users: int, positions: int, *, scale: float = 1.0, rows_are_shared: bool = False, high: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, rows, targets and weights: means over real positions; the last user has none, others have some padding."""
    rng = torch.Generator().manual_seed(positions)
    hidden = (scale * numbers(users, positions, D)).requires_grad_()
    rows = numbers(1, K, D, seed=3).expand(users, K, D) if rows_are_shared else numbers(users, K, D, seed=3)
    targets = torch.randint(1, high, (users, positions), generator=rng)
    for user in range(1, users):
        targets[user, : positions // users * user] = 0
    if users > 1:
        targets[-1] = 0
    is_real = (targets > 0).double()
    return hidden, rows, targets, is_real / is_real.sum(1, keepdim=True).clamp(min=1)


def plain(hidden: Tensor, rows: Tensor, targets: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross entropy of one user's real positions, its slope to hidden (M, D) and to rows (K, D), by torch."""
    hidden, rows = hidden.detach().clone().requires_grad_(), rows.detach().clone().requires_grad_()
    real = targets > 0
    if not real.any():
        return torch.zeros((), dtype=torch.float64), torch.zeros_like(hidden), torch.zeros_like(rows)
    if bias is None:
        loss = F.cross_entropy(hidden[real] @ rows[1:].T, targets[real] - 1)
    else:
        loss = F.cross_entropy(hidden[real] @ rows[1:].T + bias, targets[real] - 1)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, rows)))


def assert_equals_torch(hidden: Tensor, rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, factor_U: Tensor) -> None:
    table = ItemTable(rows, bias_UN=bias)
    loss_U = softmax_loss(hidden, table, targets, weight)
    (slope,) = torch.autograd.grad((loss_U * factor_U).sum(), hidden)
    assert (table.finish()[:, 0] == 0).all()
    for user, factor in enumerate(factor_U):
        wanted, wanted_hidden, wanted_rows = plain(hidden[user], rows[user], targets[user], bias[user] if bias is not None else None)
        torch.testing.assert_close(loss_U[user].detach(), wanted)
        torch.testing.assert_close(slope[user], factor * wanted_hidden)
        torch.testing.assert_close(table.finish()[user], factor * wanted_rows)


WEIGHTS = {"task weight 1": [1.0, 1.0, 1.0, 1.0], "other task weights": [0.3, 2.0, 0.0, 1.0]}


@pytest.mark.parametrize("rows_are_shared", [True, False], ids=["first step", "own rows"])
@pytest.mark.parametrize("factor", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("positions", [1, 7, POSITIONS_AT_ONCE, POSITIONS_AT_ONCE + 1, 3 * POSITIONS_AT_ONCE - 5])
def test_full_softmax_equals_cross_entropy_over_rows_1_to_i(positions: int, factor: list[float], rows_are_shared: bool):
    assert_equals_torch(*setting(4, positions, rows_are_shared=rows_are_shared), None, torch.tensor(factor, dtype=torch.float64))


@pytest.mark.parametrize("positions", [5, 2 * POSITIONS_AT_ONCE])
def test_full_softmax_without_padding_equals_cross_entropy(positions: int):
    assert_equals_torch(*setting(1, positions), None, torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("rows_are_shared", [True, False], ids=["equal rows", "own rows"])
@pytest.mark.parametrize("factor", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("positions", [1, 7, POSITIONS_AT_ONCE + 1])
def test_sampled_softmax_equals_cross_entropy_over_own_items_and_biased_candidates(positions: int, factor: list[float], rows_are_shared: bool):
    bias = numbers(4, K - 1, seed=8)
    bias[:, :OWN] = 0.0
    # Filler; the second user's candidates are all filler, so only its own items are ranked.
    bias[0, OWN + 2], bias[1, OWN:] = -INF, -INF
    assert_equals_torch(*setting(4, positions, rows_are_shared=rows_are_shared, high=OWN + 1), bias, torch.tensor(factor, dtype=torch.float64))


@pytest.mark.parametrize("is_sampled", [True, False], ids=["sampled", "full"])
def test_large_scores_neither_overflow_nor_lose_the_loss(is_sampled: bool):
    bias = torch.zeros(2, K - 1, dtype=torch.float64) if is_sampled else None
    assert_equals_torch(*setting(2, 6, scale=1e4, high=OWN + 1), bias, torch.ones(2, dtype=torch.float64))
    hidden, rows, targets, weight = (x.float() if x.is_floating_point() else x for x in setting(2, 6, scale=1e4, high=OWN + 1))
    table = ItemTable(rows, bias_UN=bias.float() if bias is not None else None)
    loss_U = softmax_loss(hidden.detach().requires_grad_(), table, targets, weight)
    loss_U.sum().backward()
    assert loss_U[0] > 1e3
    assert loss_U.isfinite().all() and table.finish().isfinite().all()


@pytest.mark.parametrize("is_sampled", [True, False], ids=["sampled", "full"])
def test_a_user_whose_rows_are_nan_breaks_nobody_else(is_sampled: bool):
    bias = torch.zeros(2, K - 1, dtype=torch.float64) if is_sampled else None

    def run(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, _, targets, weight = setting(2, 6, high=OWN + 1)
        targets, weight = targets[[0, 0]], weight[[0, 0]]
        table = ItemTable(rows, bias_UN=bias)
        loss_U = softmax_loss(hidden, table, targets, weight)
        return loss_U[0], torch.autograd.grad(loss_U.sum(), hidden)[0][0], table.finish()[0]

    _, rows, _, _ = setting(2, 6)
    ill = rows.clone()
    ill[1] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(run(rows), run(ill), strict=True))


def test_two_softmax_losses_at_one_table_add_their_slopes():
    hidden, rows, targets, weight = setting(2, 6)
    once, twice = ItemTable(rows), ItemTable(rows)
    softmax_loss(hidden, once, targets, weight).sum().backward()
    (softmax_loss(hidden, twice, targets, weight) + 2 * softmax_loss(hidden, twice, targets, weight)).sum().backward()
    torch.testing.assert_close(twice.finish(), 3 * once.finish())


def test_the_sampled_loss_is_the_full_one_where_every_other_item_is_drawn_once():
    """Eight items, two of them the user's own: six candidates, each standing for itself."""
    hidden, rows, targets, weight = setting(1, 5, high=3)
    sampled = softmax_loss(hidden, ItemTable(rows, bias_UN=torch.zeros(1, K - 1, dtype=torch.float64)), targets, weight)
    torch.testing.assert_close(sampled, softmax_loss(hidden, ItemTable(rows), targets, weight))


def test_info_nce_by_hand():
    """Cosines 1 (alike) and 0, -1 (apart), whatever the lengths."""
    left, right = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[5.0, 0.0]]])
    negatives = torch.tensor([[[0.0, 3.0], [-1.0, 0.0]]])
    for temperature in (1.0, 0.5):
        wanted = math.log(math.exp(1 / temperature) + 1 + math.exp(-1 / temperature)) - 1 / temperature
        assert info_nce(left, right, negatives, temperature=temperature).tolist() == [pytest.approx(wanted)]


def test_info_nce_is_a_mean_over_windows_of_each_users_own_cross_entropy():
    left, right, negatives = numbers(3, 2, D), numbers(3, 2, D, seed=1), numbers(3, 5, D)
    found_U = info_nce(left, right, negatives, temperature=0.2)
    for user in range(3):
        scores = [
            torch.cat([F.cosine_similarity(left[user, b], right[user, b], dim=0)[None], F.cosine_similarity(left[user, b], negatives[user], dim=-1)]) / 0.2
            for b in range(2)
        ]
        torch.testing.assert_close(found_U[user], F.cross_entropy(torch.stack(scores), torch.zeros(2, dtype=torch.long)))
