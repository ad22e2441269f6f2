"""Operations on U users at once, each with weights of its own: what encoders are written with.

Every weight carries a leading users axis. Before the first local step all users hold the same weights, given as a view
that is expanded, not copied; then a product is one large matrix product, and only its gradient is taken per user. After
it, products are batched. Both give what a loop over users gives, up to the order of float sums. The backward passes are
written out because autograd would copy an expanded weight; `tests/oracles` holds the loop they are tested against.

Shapes: activations are (U, M, D), M = windows times positions of one user; a matrix is (U, D, E), a vector (U, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def is_shared(weight_U: Tensor) -> bool:
    """Whether all users hold the same values: one user, or an expanded view."""
    return weight_U.shape[0] == 1 or weight_U.stride(0) == 0


def linear(x_UMD: Tensor, weight_UDE: Tensor, bias_UE: Tensor | None = None) -> Tensor:
    """``x @ weight + bias`` for every user. Shape: (U, M, E)."""
    result: Tensor = _Linear.apply(x_UMD, weight_UDE, bias_UE)  # type: ignore[no-untyped-call]
    return result


def layer_norm(x_UMD: Tensor, gain_UD: Tensor, bias_UD: Tensor) -> Tensor:
    """Layer normalisation over D with every user's own gain and bias (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""
    result: Tensor = _LayerNorm.apply(x_UMD, gain_UD, bias_UD)  # type: ignore[no-untyped-call]
    return result


def attention(qkv_NLE: Tensor, mask_NLL: Tensor, *, heads: int) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1).

    Shapes: ``qkv`` (N, L, 3 D): queries, keys and values side by side for N windows of any users -> (N, L, D); ``mask``
    is added to the scores, (1 or N, L, L). No weights are used here, so nothing is per user.
    """
    result: Tensor = _Attention.apply(qkv_NLE, mask_NLL, heads)  # type: ignore[no-untyped-call]
    return result


class Descent:
    """The update of one weight by SGD: ``-lr`` times the slopes it takes, on top of what earlier steps left.

    As the attribute ``descent`` of a weight it takes the slopes that `linear` finds, each product and its sum in one pass over memory; autograd
    then has none to give.
    """

    def __init__(self, lr: float, update_U: Tensor | None = None):
        self.lr, self.update_U = lr, update_U

    def take(self, slope_U: Tensor, *, may_overwrite: bool = False) -> None:
        """Take a slope; ``may_overwrite``: nobody else reads its memory."""
        if self.update_U is not None:
            self.update_U.add_(slope_U, alpha=-self.lr)
        else:
            self.update_U = slope_U.mul_(-self.lr) if may_overwrite else slope_U * -self.lr

    def take_product(self, left_UDM: Tensor, right_UME: Tensor) -> None:
        """Take the slope ``left @ right``."""
        is_first = self.update_U is None
        if self.update_U is None:
            self.update_U = torch.empty(len(left_UDM), left_UDM.shape[1], right_UME.shape[2], dtype=left_UDM.dtype)
        self.update_U.baddbmm_(left_UDM, right_UME, beta=0 if is_first else 1, alpha=-self.lr)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.descent = bias is not None, getattr(weight, "descent", None)
        if is_shared(weight):
            flat = x.reshape(-1, x.shape[-1])
            out = flat @ weight[0] if bias is None else torch.addmm(bias[0], flat, weight[0])
            return out.view(*x.shape[:-1], weight.shape[-1])
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = slopes
        x, weight = ctx.saved_tensors
        if is_shared(weight):
            slope_x = (slope.reshape(-1, slope.shape[-1]) @ weight[0].T).view(x.shape)
        else:
            slope_x = torch.bmm(slope, weight.transpose(1, 2))
        slope_weight = None
        if ctx.descent is None:
            slope_weight = torch.bmm(x.transpose(1, 2), slope)
        else:
            ctx.descent.take_product(x.transpose(1, 2), slope)
        return slope_x, slope_weight, slope.sum(1) if ctx.has_bias else None


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        normal, mean, scale = torch.native_layer_norm(x, (x.shape[-1],), None, None, 1e-5)
        ctx.save_for_backward(x, gain, normal, mean, scale)
        return torch.addcmul(bias[:, None], normal, gain[:, None])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = slopes
        x, gain, normal, mean, scale = ctx.saved_tensors
        slope_x = torch.ops.aten.native_layer_norm_backward(slope * gain[:, None], x, [x.shape[-1]], mean, scale, None, None, [True, False, False])[0]
        return slope_x, (slope * normal).sum(1), slope.sum(1)


class _Attention(Function):
    """Attention with its backward written out: explicit products beat the fused kernel at windows of 50 to 200."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor, heads: int) -> Tensor:
        N, L, D3 = qkv.shape
        width = D3 // 3 // heads
        query, keys, values = qkv.view(N, L, 3, heads, width).permute(2, 0, 3, 1, 4).reshape(3, N * heads, L, width)
        if mask.shape[0] > 1:
            mask = mask[:, None].expand(N, heads, L, L).reshape(N * heads, L, L)
        weight = torch.softmax(torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=width**-0.5), -1)
        ctx.save_for_backward(query, keys, values, weight)
        ctx.heads = heads
        return torch.bmm(weight, values).view(N, heads, L, width).transpose(1, 2).reshape(N, L, heads * width)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = slopes
        query, keys, values, weight = ctx.saved_tensors
        heads: int = ctx.heads
        NH, L, width = query.shape
        N = NH // heads
        slope = slope.view(N, L, heads, width).transpose(1, 2).reshape(NH, L, width)
        out = torch.empty(3, NH, L, width, dtype=query.dtype)
        torch.bmm(weight.transpose(1, 2), slope, out=out[2])
        slope_score = torch._softmax_backward_data(torch.bmm(slope, values.transpose(1, 2)), weight, -1, weight.dtype)
        torch.bmm(slope_score, keys, out=out[0])
        torch.bmm(slope_score.transpose(1, 2), query, out=out[1])
        out[:2].mul_(width**-0.5)
        return out.view(3, N, heads, L, width).permute(1, 3, 0, 2, 4).reshape(N, L, 3 * heads * width), None, None
