"""Encoders over one window of one user in torch's own layers: what those of the users axis must equal.

Each takes the vectors of a window that begins with an event, (L, D), and where events are; places between events are not read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.config import EncoderConfig

Leaves = Mapping[str, Tensor]


def norm(x_LD: Tensor, weights: Leaves, name: str) -> Tensor:
    return F.layer_norm(x_LD, x_LD.shape[-1:], weights[f"{name}.gain"], weights[f"{name}.bias"])


def gru4rec(weights: Leaves, vectors_LD: Tensor, is_there_L: Tensor, config: EncoderConfig, masks_SLD: Tensor | None) -> Tensor:
    """torch's GRU over the events alone; a place without one shows the state before it."""
    x_LD = vectors_LD * config.width**0.5
    if masks_SLD is not None:
        x_LD = x_LD * masks_SLD[0, -len(x_LD) :]
    flat = []
    for layer in range(config.blocks):
        name = f"layer{layer}."
        flat += [weights[name + "input"].T, weights[name + "recurrent"].T, weights[name + "bias"], torch.zeros_like(weights[name + "bias"])]
    before = torch.zeros(config.blocks, 1, config.hidden)
    state_1EH, _ = torch.gru(x_LD[is_there_L][None], before, flat, True, config.blocks, 0.0, True, False, True)
    state_LH = state_1EH[0][is_there_L.cumsum(0) - 1]
    return norm(state_LH @ weights["out"], weights, "norm")


def hgrn(weights: Leaves, vectors_LD: Tensor, is_there_L: Tensor, config: EncoderConfig, masks_SLD: Tensor | None) -> Tensor:
    """One event after the other; each block's state is a gated mean of what it read."""
    drop = iter([] if masks_SLD is None else masks_SLD[:, -len(vectors_LD) :])

    def dropped(x_LD: Tensor) -> Tensor:
        return x_LD if masks_SLD is None else x_LD * next(drop)

    x_LD = dropped(vectors_LD * config.width**0.5)
    for block in range(config.blocks):
        name = f"block{block}."
        forget_LD, value_LD, gate_LD = (norm(x_LD, weights, name + "norm") @ weights[name + "in"] + weights[name + "in.bias"]).chunk(3, -1)
        state, states = torch.zeros(config.width), []
        for forget, value, is_there in zip(torch.sigmoid(forget_LD), value_LD, is_there_L, strict=True):
            if is_there:
                state = forget * state + (1 - forget) * value
            states.append(state)
        x_LD = x_LD + dropped((torch.stack(states) * F.silu(gate_LD)) @ weights[name + "out"])
    return norm(x_LD, weights, "norm")


def bert4rec(weights: Leaves, vectors_LD: Tensor, is_there_L: Tensor, config: EncoderConfig, masks_SLD: Tensor | None) -> Tensor:
    """torch's multi-head attention in both directions, pre-norm; positions from the right edge."""
    L, D = vectors_LD.shape
    drop = iter([] if masks_SLD is None else masks_SLD[:, -L:])

    def dropped(x_LD: Tensor) -> Tensor:
        return x_LD if masks_SLD is None else x_LD * next(drop)

    x_LD = dropped((vectors_LD * D**0.5 + weights["positions"][-L:]) * is_there_L[:, None])
    for block in range(config.blocks):
        name = f"block{block}."
        at_LD = norm(x_LD, weights, name + "norm1")
        read_LD, _ = F.multi_head_attention_forward(
            at_LD,
            at_LD,
            at_LD,
            D,
            config.heads,
            weights[name + "qkv"].T,
            None,
            None,
            None,
            False,
            0.0,
            weights[name + "out"].T,
            None,  # type: ignore[arg-type]
            key_padding_mask=~is_there_L,
            need_weights=False,
        )
        x_LD = x_LD + dropped(read_LD)
        wide_LF = F.relu(F.linear(norm(x_LD, weights, name + "norm2"), weights[name + "up"].T, weights[name + "up.bias"]))
        x_LD = x_LD + dropped(F.linear(wide_LF, weights[name + "down"].T, weights[name + "down.bias"]))
    return norm(x_LD, weights, "norm")
