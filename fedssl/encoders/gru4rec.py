"""GRU4Rec: a gated recurrent network over the events of a history, its cell written out.

Source: Hidasi et al. 2016, https://arxiv.org/abs/1511.06939; the cell: Cho et al. 2014, https://arxiv.org/abs/1406.1078,
with the reset gate behind the recurrent product, as in torch's GRU, so that one product a position is enough. The layer norm
in front of the scores is ours: updates of all encoders are then of one size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fedssl.config import EncoderConfig
from fedssl.encoders import Encoder
from fedssl.errors import ConfigError
from fedssl.users_axis import is_shared, layer_norm, linear
from fedssl.weights import Weights

ALWAYS = 1e9


def gru4rec(config: EncoderConfig) -> Encoder:
    """``config.blocks`` layers of state width ``config.hidden``; one dropout mask, on the item vectors.

    Over a place without an event the state stays what it is, so it is zero until the first event. Raises ConfigError for no layer.
    """
    D, H, layers = config.width, config.hidden, config.blocks
    if layers == 0:
        raise ConfigError("[encoder] blocks = 0: gru4rec without a layer reads nothing; set blocks = 1 or more")

    def init(rng: torch.Generator) -> Weights:
        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=rng) * std

        weights: Weights = {}
        for layer in range(layers):
            name, width = f"layer{layer}.", H if layer else D
            weights |= {name + "input": normal(width, 3 * H, std=width**-0.5), name + "bias": torch.zeros(3 * H)}
            weights |= {name + "recurrent": normal(H, 3 * H, std=H**-0.5)}
        return weights | {"out": normal(H, D, std=H**-0.5), "norm.gain": torch.ones(D), "norm.bias": torch.zeros(D)}

    def encode(weights: Weights, rows_UBLD: Tensor, is_padding_UBL: Tensor, masks: Sequence[Tensor]) -> Tensor:
        U, B, L, _ = rows_UBLD.shape
        M = L * B
        read_UBLD = rows_UBLD * math.sqrt(D)
        if masks:
            read_UBLD = read_UBLD * masks[0]
        # Positions lead, so that what a step of the recurrence reads lies together.
        hidden_UMD = read_UBLD.transpose(1, 2).reshape(U, M, D)
        is_padding_UM = is_padding_UBL.transpose(1, 2).reshape(U, M)
        for layer in range(layers):
            name = f"layer{layer}."
            gates_UMG = linear(hidden_UMD, weights[name + "input"], weights[name + "bias"])
            hidden_UMD = recurrence(gates_UMG, weights[name + "recurrent"], is_padding_UM, windows=B)
        out_UMD = layer_norm(linear(hidden_UMD, weights["out"]), weights["norm.gain"], weights["norm.bias"])
        return out_UMD.view(U, L, B, D).transpose(1, 2)

    return Encoder(init=init, encode=encode, dropout_sites=1)


def recurrence(gates_UMG: Tensor, recurrent_UHG: Tensor, is_padding_UM: Tensor, *, windows: int) -> Tensor:
    """The states of a GRU after each position, from zero. Shapes: (U, M, 3 H), (U, H, 3 H), (U, M) -> (U, M, H).

    M runs over positions, and inside a position over ``windows``; gates are reset, update, candidate. With x the gates that
    come from the input and h R those from the state: ``r, z = sigmoid(x + h R)``, ``n = tanh(x + r * h R)``,
    ``h' = (1 - z) n + z h``, and z is 1 over padding, exactly.
    """
    result: Tensor = _Recurrence.apply(gates_UMG, recurrent_UHG, is_padding_UM, windows)  # type: ignore[no-untyped-call]
    return result


class _Recurrence(Function):
    """Backward through time by hand: autograd would add up a gradient of the recurrent weights, one a user, at every position."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, recurrent: Tensor, is_padding: Tensor, windows: int) -> Tensor:
        U, M, G = gates.shape
        H, L = G // 3, M // windows
        x = gates.view(U, L, windows, G).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        x[..., H : 2 * H] += (is_padding.view(U, L, windows).transpose(0, 1) * ALWAYS)[..., None]
        state = torch.zeros(L + 1, U, windows, H, dtype=gates.dtype)
        reset_update, candidate, from_state = torch.empty_like(x[..., : 2 * H]), torch.empty_like(x[..., :H]), torch.empty_like(x)
        for t in range(L):
            _product(state[t], recurrent, out=from_state[t])
            torch.add(x[t, ..., : 2 * H], from_state[t, ..., : 2 * H], out=reset_update[t]).sigmoid_()
            torch.addcmul(x[t, ..., 2 * H :], reset_update[t, ..., :H], from_state[t, ..., 2 * H :], out=candidate[t]).tanh_()
            torch.lerp(candidate[t], state[t], reset_update[t, ..., H:], out=state[t + 1])
        ctx.save_for_backward(recurrent, state, reset_update, candidate, from_state)
        return state[1:].transpose(0, 1).reshape(U, M, H)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        recurrent, state, reset_update, candidate, from_state = ctx.saved_tensors
        L, U, B, H = candidate.shape
        slope = slopes[0].view(U, L, B, H).transpose(0, 1).clone(memory_format=torch.contiguous_format)
        reset, update = reset_update[..., :H], reset_update[..., H:]
        # d gate / d state, for all positions at once; what is left for the loop is one product and three small operations.
        to_candidate = (1 - update) * (1 - candidate * candidate)
        factor = torch.empty(L, U, B, 3, H, dtype=slope.dtype)
        torch.mul(to_candidate * from_state[..., 2 * H :], reset * (1 - reset), out=factor[..., 0, :])
        torch.mul(state[:-1] - candidate, update * (1 - update), out=factor[..., 1, :])
        torch.mul(to_candidate, reset, out=factor[..., 2, :])
        back = recurrent[:1].transpose(1, 2) if is_shared(recurrent) else recurrent.transpose(1, 2)
        later = torch.empty_like(slope[0])
        for t in range(L - 1, -1, -1):
            factor[t].mul_(slope[t, ..., None, :])
            if t:
                _product(factor[t].view(U, B, 3 * H), back, out=later)
                slope[t - 1].add_(later).addcmul_(slope[t], update[t])
        slope_from_state = factor.view(L, U, B, 3 * H).transpose(0, 1).reshape(U, L * B, 3 * H)
        before = state[:-1].transpose(0, 1).reshape(U, L * B, H)
        slope_gates = slope_from_state.clone()
        slope_gates[..., 2 * H :] = (slope * to_candidate).transpose(0, 1).reshape(U, L * B, H)
        return slope_gates, torch.bmm(before.transpose(1, 2), slope_from_state), None, None


def _product(x_UBH: Tensor, weight_UHG: Tensor, *, out: Tensor) -> None:
    """``x @ weight`` for every user into memory at hand."""
    if is_shared(weight_UHG):
        torch.mm(x_UBH.view(-1, x_UBH.shape[-1]), weight_UHG[0], out=out.view(-1, out.shape[-1]))
    else:
        torch.bmm(x_UBH, weight_UHG, out=out)
