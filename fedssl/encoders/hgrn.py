"""HGRN, a light one: gated running means instead of attention; no product grows with the window.

Source: Qin et al. 2023, https://arxiv.org/abs/2311.04823: a linear recurrence whose forget gate reads the input alone, and a gate at
its output. So all products are taken for all positions at once, and what runs through time is one multiply-add a position.
Ours is real-valued; in place of the paper's lower bounds the gates begin spread from short memory to long; there is no feed-forward
layer (in place of the output gate it took a fifth more time and learned no better in a short trial on ML-1M).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fedssl.config import EncoderConfig
from fedssl.encoders import Encoder
from fedssl.users_axis import layer_norm, linear
from fedssl.weights import Weights

ALWAYS = 1e9
SHORTEST, LONGEST = -1.0, 3.0
"""Logits of the first forget gates: channels begin with a memory of 1.4 to 21 events."""


def hgrn(config: EncoderConfig) -> Encoder:
    """``config.blocks`` blocks of width ``config.width``. Over a place without an event the running mean stays what it is."""
    D, blocks = config.width, config.blocks

    def init(rng: torch.Generator) -> Weights:
        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=rng) * std

        weights: Weights = {}
        for block in range(blocks):
            name = f"block{block}."
            weights |= {
                name + "norm.gain": torch.ones(D),
                name + "norm.bias": torch.zeros(D),
                name + "in": normal(D, 3 * D, std=D**-0.5),
                name + "in.bias": torch.cat([torch.linspace(SHORTEST, LONGEST, D), torch.zeros(2 * D)]),
                name + "out": normal(D, D, std=0.5 * D**-0.5),
            }
        return weights | {"norm.gain": torch.ones(D), "norm.bias": torch.zeros(D)}

    def encode(weights: Weights, rows_UBLD: Tensor, is_padding_UBL: Tensor, masks: Sequence[Tensor]) -> Tensor:
        U, B, L, _ = rows_UBLD.shape
        M = L * B
        drop = iter(masks)

        def dropped(x_UMD: Tensor) -> Tensor:
            return x_UMD * next(drop).transpose(1, 2).reshape(U, M, D) if masks else x_UMD

        # Positions lead, so that what a step of the running mean reads lies together.
        hidden_UMD = dropped((rows_UBLD * math.sqrt(D)).transpose(1, 2).reshape(U, M, D))
        always_UM1 = (is_padding_UBL.transpose(1, 2).reshape(U, M) * ALWAYS)[..., None]
        for block in range(blocks):
            name = f"block{block}."
            normal_UMD = layer_norm(hidden_UMD, weights[name + "norm.gain"], weights[name + "norm.bias"])
            forget_UMD, value_UMD, gate_UMD = linear(normal_UMD, weights[name + "in"], weights[name + "in.bias"]).chunk(3, -1)
            mean_UMD = running_mean(forget_UMD + always_UM1, value_UMD, windows=B)
            hidden_UMD = hidden_UMD + dropped(linear(mean_UMD * F.silu(gate_UMD), weights[name + "out"]))
        return layer_norm(hidden_UMD, weights["norm.gain"], weights["norm.bias"]).view(U, L, B, D).transpose(1, 2)

    return Encoder(init=init, encode=encode, dropout_sites=1 + blocks)


def running_mean(forget_UMD: Tensor, value_UMD: Tensor, *, windows: int) -> Tensor:
    """``h = f h + (1 - f) value`` from zero, with ``f = sigmoid(forget)``, after each position. Shape: (U, M, D).

    M runs over positions, and inside a position over ``windows``. A forget of 1e9 leaves the state exactly as it is.
    """
    result: Tensor = _RunningMean.apply(forget_UMD, value_UMD, windows)  # type: ignore[no-untyped-call]
    return result


class _RunningMean(Function):
    """Backward by hand: the slope runs back through the same gates; autograd would keep a graph node an operation and position."""

    @staticmethod
    def forward(ctx: Any, forget: Tensor, value: Tensor, windows: int) -> Tensor:
        U, M, D = forget.shape
        L = M // windows

        def lead(x_UMD: Tensor) -> Tensor:
            return x_UMD.reshape(U, L, windows, D).transpose(0, 1).reshape(L, U * windows, D)

        keep, value = torch.sigmoid(lead(forget)), lead(value)
        state = torch.zeros(L + 1, U * windows, D, dtype=forget.dtype)
        torch.mul(1 - keep, value, out=state[1:])
        for t in range(L):
            state[t + 1].addcmul_(keep[t], state[t])
        ctx.save_for_backward(keep, value, state)
        ctx.shape = (L, U, windows, D)
        return state[1:].view(L, U, windows, D).transpose(0, 1).reshape(U, M, D)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        keep, value, state = ctx.saved_tensors
        L, U, B, D = ctx.shape
        slope = slopes[0].reshape(U, L, B, D).transpose(0, 1).clone(memory_format=torch.contiguous_format).view(L, U * B, D)
        for t in range(L - 1, 0, -1):
            slope[t - 1].addcmul_(keep[t], slope[t])

        def back(x_LND: Tensor) -> Tensor:
            return x_LND.view(L, U, B, D).transpose(0, 1).reshape(U, L * B, D)

        new = slope * (1 - keep)
        return back(new * (state[:-1] - value) * keep), back(new), None
