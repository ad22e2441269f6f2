"""SASRec: a causal transformer over the newest events of a history (pre-norm, no bias in attention).

Source: Kang and McAuley 2018, https://arxiv.org/abs/1808.09781; pre-norm and the position table read from the right edge
are ours: position 0 is the newest event, so that padding on the left changes nothing. Keys and queries have no bias: a
key bias has no gradient under softmax, and Adam would turn its rounding into whole steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedssl.config import EncoderConfig
from fedssl.encoders import Encoder
from fedssl.users_axis import attention, layer_norm, linear
from fedssl.weights import Weights

NEVER = -1e9


def sasrec(config: EncoderConfig) -> Encoder:
    """The encoder with the widths of ``config``."""
    return transformer(config, is_causal=True)


def transformer(config: EncoderConfig, *, is_causal: bool) -> Encoder:
    """Blocks of attention and a feed-forward layer; causal, or over the whole window with one position more for a mask."""
    D, hidden, blocks = config.width, config.hidden, config.blocks
    positions = config.window if is_causal else config.window + 1

    def init(rng: torch.Generator) -> Weights:
        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=rng) * std

        weights = {"positions": normal(positions, D, std=0.05)}
        for block in range(blocks):
            name = f"block{block}."
            weights |= {
                name + "norm1.gain": torch.ones(D),
                name + "norm1.bias": torch.zeros(D),
                name + "qkv": normal(D, 3 * D, std=D**-0.5),
                name + "out": normal(D, D, std=0.5 * D**-0.5),
                name + "norm2.gain": torch.ones(D),
                name + "norm2.bias": torch.zeros(D),
                name + "up": normal(D, hidden, std=D**-0.5),
                name + "up.bias": torch.zeros(hidden),
                name + "down": normal(hidden, D, std=0.5 * hidden**-0.5),
                name + "down.bias": torch.zeros(D),
            }
        if not is_causal:
            weights["mask"] = normal(D, std=0.05)
        return weights | {"norm.gain": torch.ones(D), "norm.bias": torch.zeros(D)}

    def encode(weights: Weights, rows_UBLD: Tensor, is_padding_UBL: Tensor, masks: Sequence[Tensor]) -> Tensor:
        U, B, L, _ = rows_UBLD.shape
        M = B * L
        drop = iter(masks)

        def dropped(x_UMD: Tensor) -> Tensor:
            return x_UMD * next(drop).view(U, M, D) if masks else x_UMD

        has_padding = bool(is_padding_UBL.any())
        hidden_UBLD = rows_UBLD * math.sqrt(D) + weights["positions"][:, None, -L:]
        if has_padding:
            hidden_UBLD = hidden_UBLD * (~is_padding_UBL)[..., None]
        mask_NLL = torch.full((1, L, L), NEVER).triu(1) if is_causal else torch.zeros(1, 1, 1).expand(1, L, L)
        if has_padding:
            mask_NLL = torch.minimum(mask_NLL, is_padding_UBL.view(U * B, 1, L) * NEVER)

        hidden_UMD = dropped(hidden_UBLD.reshape(U, M, D))
        for block in range(blocks):
            name = f"block{block}."
            normal_UMD = layer_norm(hidden_UMD, weights[name + "norm1.gain"], weights[name + "norm1.bias"])
            qkv_NLE = linear(normal_UMD, weights[name + "qkv"]).view(U * B, L, 3 * D)
            read_UMD = attention(qkv_NLE, mask_NLL, heads=config.heads).view(U, M, D)
            hidden_UMD = hidden_UMD + dropped(linear(read_UMD, weights[name + "out"]))
            normal_UMD = layer_norm(hidden_UMD, weights[name + "norm2.gain"], weights[name + "norm2.bias"])
            wide_UMF = torch.relu(linear(normal_UMD, weights[name + "up"], weights[name + "up.bias"]))
            hidden_UMD = hidden_UMD + dropped(linear(wide_UMF, weights[name + "down"], weights[name + "down.bias"]))
        return layer_norm(hidden_UMD, weights["norm.gain"], weights["norm.bias"]).view(U, B, L, D)

    return Encoder(init=init, encode=encode, dropout_sites=1 + 2 * blocks, is_causal=is_causal)
