"""Losses of U users at once: softmax over the catalogue or over drawn candidates, and InfoNCE.

The softmax losses compute their slopes in the forward pass, a user at a time, so that the scores of one user stay in the
cache and the slope of a shared table is never expanded. `tests/oracles` holds the loop with torch's cross entropy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fedssl.item_table import ItemTable

POSITIONS_AT_ONCE = 48
"""Positions of a user whose scores over the whole catalogue are held at once: for thousands of items they then stay in a core's own cache."""


def softmax_loss(hidden_UMD: Tensor, table: ItemTable, targets_UM: Tensor, weight_UM: Tensor) -> Tensor:
    """Cross entropy of the targets among the table's candidates, weighted over positions. Shape: (U,).

    Where candidates were drawn (uniformly, without the user's own items), the table's bias scales their mass to that of
    all other items (logQ correction), so that the loss estimates the full one. The user's own items, the target among them, are
    in the sum exactly: what was met before is pushed down as in the full loss. ``weight_UM`` is 0 at padded positions.
    Source: full softmax, e.g. Klenitskiy and Vasilev 2023, https://arxiv.org/abs/2309.07602; correction: Bengio and
    Senecal 2008, https://doi.org/10.1109/TNN.2007.912312.
    """
    function = _FullSoftmax if table.ranks_all else _SampledSoftmax
    result: Tensor = function.apply(hidden_UMD, table, targets_UM, weight_UM)  # type: ignore[no-untyped-call]
    return result


def info_nce(left_UBD: Tensor, right_UBD: Tensor, negatives_UND: Tensor, *, temperature: float) -> Tensor:
    """Each left view must pick its right view among that user's negatives, by cosine. Shape: (U,), a mean over windows.

    Source: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, equation 4.
    """
    left, right, negatives = (F.normalize(x, dim=-1) for x in (left_UBD, right_UBD, negatives_UND))
    alike_UB = (left * right).sum(-1) / temperature
    apart_UBN = left @ negatives.transpose(1, 2) / temperature
    return (torch.logsumexp(torch.cat([alike_UB[..., None], apart_UBN], -1), -1) - alike_UB).mean(1)


class _FullSoftmax(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: ItemTable, targets: Tensor, weight: Tensor) -> Tensor:
        U, M, D = hidden.shape
        rows = table.rows_UKD
        slope_hidden = torch.zeros_like(hidden)
        slope_rows = torch.empty(U, rows.shape[1], D, dtype=hidden.dtype)
        loss = torch.zeros(U, dtype=hidden.dtype)
        is_shared = rows.shape[0] == 1 or rows.stride(0) == 0
        has_padding = bool((weight == 0).any())
        for user in range(U):
            own = rows[0] if is_shared else rows[user]
            real = weight[user].nonzero()[:, 0] if has_padding else None
            h, t, w = (x[user] if real is None else x[user][real] for x in (hidden, targets, weight))
            slope_h = torch.empty_like(h)
            if len(h) == 0:
                slope_rows[user].zero_()
            for start in range(0, len(h), POSITIONS_AT_ONCE):
                part = slice(start, start + POSITIONS_AT_ONCE)
                score = h[part] @ own.T
                right = score.gather(1, t[part, None])[:, 0]
                score[:, 0] = -math.inf
                top = score.amax(1)
                score.sub_(top[:, None]).exp_()
                mass = score.sum(1)
                loss[user] += (w[part] * (mass.log() + top - right)).sum()
                factor = (w[part] / mass)[:, None]
                torch.mul(score @ own, factor, out=slope_h[part])
                if start == 0:
                    torch.mm(score.T, h[part] * factor, out=slope_rows[user])
                else:
                    slope_rows[user].addmm_(score.T, h[part] * factor)
            slope_h.addcmul_(own[t], w[:, None], value=-1.0)
            slope_rows[user].index_add_(0, t, h * -w[:, None])
            if real is None:
                slope_hidden[user] = slope_h
            else:
                slope_hidden[user][real] = slope_h
        ctx.table, ctx.slopes = table, (slope_hidden, slope_rows)
        return loss

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, slopes[0]), None, None, None


class _SampledSoftmax(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: ItemTable, targets: Tensor, weight: Tensor) -> Tensor:
        assert table.bias_UN is not None
        slope_rows = torch.empty(hidden.shape[0], *table.rows_UKD.shape[1:], dtype=hidden.dtype)
        slope_rows[:, 0].zero_()
        candidates = table.rows_UKD[:, 1:]
        score = torch.baddbmm(table.bias_UN[:, None], hidden, candidates.transpose(1, 2))
        # Padded positions have no target: theirs is the first column, and their weight 0.
        right = score.gather(2, (targets - 1).clamp(min=0)[..., None])[..., 0]
        top = score.amax(-1)
        score.sub_(top[..., None]).exp_()
        mass = score.sum(-1)
        loss = torch.where(weight > 0, weight * (mass.log() + top - right), 0.0).sum(1)
        score.mul_((weight / mass)[..., None])
        slope_hidden = torch.bmm(score, candidates).addcmul_(table.gather(targets), weight[..., None], value=-1.0)
        torch.bmm(score.transpose(1, 2), hidden, out=slope_rows[:, 1:])
        ctx.table, ctx.slopes = table, (slope_hidden, slope_rows)
        ctx.targets, ctx.slope_right = targets, hidden * -weight[..., None]
        return loss

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        result = _scaled(ctx, slopes[0])
        ctx.table.add_slope_at(ctx.targets, ctx.slope_right * slopes[0][:, None, None])
        return result, None, None, None


def _scaled(ctx: Any, slope_U: Tensor) -> Tensor:
    """The slopes of the forward pass times the one that arrives (1 for a task of weight 1), the rows' given to the table."""
    slope_hidden, slope_rows = ctx.slopes
    if bool((slope_U != 1).any()):
        factor = slope_U[:, None, None]
        slope_hidden, slope_rows = slope_hidden * factor, slope_rows.mul_(factor)
    ctx.table.add_slope(slope_rows)
    ctx.slopes = None
    result: Tensor = slope_hidden
    return result
