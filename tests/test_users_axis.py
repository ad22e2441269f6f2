"""Operations on U users at once equal plain torch for each user, in values and in slopes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from fedssl.encoders.sasrec import NEVER
from fedssl.users_axis import Descent, attention, is_shared, layer_norm, linear

U, M, D, E = 3, 4, 6, 5


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return numbers(*shape, seed=seed).requires_grad_()


def for_users(weight: Tensor, users: int = U) -> Tensor:
    """A weight without a users axis as all users hold it at first: a view, expanded, as a leaf of its own."""
    return weight.expand(users, *weight.shape).detach().requires_grad_()


def slopes_of(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * numbers(*out.shape, seed=99)).sum(), leaves)


def one_by_one(function, out_seed_shape, *leaves_U: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A function of one user's tensors called for each user: values, and slopes stacked."""
    out, slopes = [], []
    upstream = numbers(*out_seed_shape, seed=99)
    for user in range(out_seed_shape[0]):
        mine = [x[user].detach().clone().requires_grad_() for x in leaves_U]
        value = function(*mine)
        out.append(value.detach())
        slopes.append(torch.autograd.grad((value * upstream[user]).sum(), mine))
    return torch.stack(out), [torch.stack(each) for each in zip(*slopes, strict=True)]


def test_weights_are_shared_where_they_are_an_expanded_view_or_of_one_user():
    assert is_shared(numbers(D, E).expand(U, D, E))
    assert is_shared(numbers(D).expand(U, D).detach().requires_grad_())
    assert is_shared(numbers(1, D, E))
    assert not is_shared(numbers(U, D, E))


@pytest.mark.parametrize("is_expanded", [True, False], ids=["shared", "own"])
def test_a_descent_takes_the_steps_that_autograd_would_have_the_slopes_for(is_expanded: bool):
    x = leaf(U, M, D)
    weight = for_users(numbers(D, E)) if is_expanded else leaf(U, D, E)
    (slope,) = slopes_of(linear(x, weight) + 2 * linear(x.square(), weight), weight)
    begun = numbers(U, D, E, seed=7)
    for before in (None, begun):
        weight.descent = Descent(0.1, None if before is None else before.clone())  # type: ignore[attr-defined]
        out = linear(x, weight) + 2 * linear(x.square(), weight)
        assert torch.autograd.grad((out * numbers(*out.shape, seed=99)).sum(), [x, weight], allow_unused=True)[1] is None
        weight.descent.take(numbers(U, D, E, seed=8))  # type: ignore[attr-defined]
        wanted = -0.1 * (slope + numbers(U, D, E, seed=8)) + (0 if before is None else before)
        assert torch.allclose(weight.descent.update_U, wanted, rtol=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_expanded", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("users", [1, U])
def test_linear_equals_torchs_for_each_user(is_expanded: bool, has_bias: bool, users: int):
    x = leaf(users, M, D)
    weight, bias = (for_users(numbers(D, E), users), for_users(numbers(E), users)) if is_expanded else (leaf(users, D, E), leaf(users, E))
    leaves = [x, weight, bias] if has_bias else [x, weight]
    out = linear(x, weight, bias if has_bias else None)
    wanted, wanted_slopes = one_by_one(lambda x, w, b=None: F.linear(x, w.T, b), (users, M, E), *leaves)
    torch.testing.assert_close(out, wanted)
    for slope, expected in zip(slopes_of(out, *leaves), wanted_slopes, strict=True):
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("is_expanded", [True, False], ids=["shared", "own"])
def test_layer_norm_equals_torchs_for_each_user(is_expanded: bool):
    x = leaf(U, M, D)
    gain, bias = (for_users(numbers(D)), for_users(numbers(D, seed=1))) if is_expanded else (leaf(U, D), leaf(U, D, seed=1))
    out = layer_norm(x, gain, bias)
    wanted, wanted_slopes = one_by_one(lambda x, g, b: F.layer_norm(x, (D,), g, b), (U, M, D), x, gain, bias)
    torch.testing.assert_close(out, wanted)
    for slope, expected in zip(slopes_of(out, x, gain, bias), wanted_slopes, strict=True):
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("masks", [1, U])
def test_attention_equals_torchs_for_each_window(heads: int, masks: int):
    qkv = leaf(U, M, 3 * D)
    mask = torch.full((masks, M, M), NEVER, dtype=torch.float64).triu(1)
    if masks > 1:
        mask[1, 1:, 0] = NEVER
    out = attention(qkv, mask, heads=heads)

    def plain(x: Tensor, own_mask: Tensor) -> Tensor:
        query, key, value = (part.view(M, heads, D // heads).transpose(0, 1) for part in x.chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=own_mask).transpose(0, 1).reshape(M, D)

    wanted, (wanted_slope, _) = one_by_one(plain, (U, M, D), qkv, mask.expand(U, M, M))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(slopes_of(out, qkv)[0], wanted_slope)


def test_slopes_are_those_of_finite_differences_for_own_weights():
    assert gradcheck(linear, (leaf(U, M, D), leaf(U, D, E), leaf(U, E)))
    assert gradcheck(layer_norm, (leaf(U, M, D), leaf(U, D), leaf(U, D, seed=1)))
    assert gradcheck(lambda x: attention(x, torch.zeros(1, M, M, dtype=torch.float64).triu(1), heads=2), (leaf(U, M, 3 * D),))


def test_slopes_are_those_of_finite_differences_for_shared_weights():
    """The sum over users, which expanding a leaf takes, is the slope of the one weight behind the view."""
    assert gradcheck(lambda x, w, b: linear(x, w.expand(U, D, E), b.expand(U, E)), (leaf(U, M, D), leaf(D, E), leaf(E)))
    assert gradcheck(lambda x, g, b: layer_norm(x, g.expand(U, D), b.expand(U, D)), (leaf(U, M, D), leaf(D), leaf(D, seed=1)))


def test_slopes_that_arrive_as_views_are_taken_as_they_are():
    """A sum sends one number back, expanded; a transposed reader sends a transposed slope."""
    x, weight, gain, bias = leaf(U, M, D), leaf(U, D, D), leaf(U, D), leaf(U, D, seed=1)
    ones = torch.ones(U, M, D, dtype=torch.float64)
    for out, leaves in ((linear(x, weight), (x, weight)), (layer_norm(x, gain, bias), (x, gain, bias))):
        for slope, expected in zip(torch.autograd.grad(out.sum(), leaves, retain_graph=True), torch.autograd.grad((out * ones).sum(), leaves), strict=True):
            torch.testing.assert_close(slope, expected)
    qkv, mask = leaf(U, M, 3 * D), torch.zeros(1, M, M, dtype=torch.float64)
    turned = numbers(D, M, U, seed=5)
    (slope,) = torch.autograd.grad((attention(qkv, mask, heads=2).permute(2, 1, 0) * turned).sum(), qkv)
    (expected,) = torch.autograd.grad((attention(qkv, mask, heads=2) * turned.permute(2, 1, 0).contiguous()).sum(), qkv)
    torch.testing.assert_close(slope, expected)


def test_large_scores_do_not_overflow():
    qkv = torch.full((1, M, 3 * D), 1e15, requires_grad=True)
    out = attention(qkv, torch.full((1, M, M), NEVER).triu(1), heads=2)
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()


def test_no_position_at_all_gives_an_empty_answer():
    assert linear(torch.zeros(1, 0, D), torch.zeros(1, D, E), torch.zeros(1, E)).shape == (1, 0, E)
