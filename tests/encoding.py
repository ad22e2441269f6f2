"""An encoder alone over a small table, with weights that are nowhere special: what tests of encoders share."""

from __future__ import annotations

import torch
from torch import Tensor

from fedssl.config import EncoderConfig
from fedssl.encoders import Encoder
from fedssl.parts import ENCODERS
from fedssl.weights import Weights

D = 8


def make(config: EncoderConfig) -> Encoder:
    return ENCODERS[config.name](config)


def weights_of(config: EncoderConfig, seed: int = 0) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {name: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for name, leaf in make(config).init(rng).items()}


def table(seed: int = 1) -> Tensor:
    return torch.randn(21, D, generator=torch.Generator().manual_seed(seed))


def encode(config: EncoderConfig, weights: Weights, rows_BL: Tensor, masks: tuple[Tensor, ...] = ()) -> Tensor:
    """Hidden states (B, L, D) of one user's windows."""
    return make(config).encode({name: leaf[None] for name, leaf in weights.items()}, table()[rows_BL][None], rows_BL[None] == 0, masks)[0]


def padded(rows: list[int], length: int) -> Tensor:
    """A window of these rows on the right. Shape: (1, length)."""
    return torch.tensor([[0] * (length - len(rows)) + rows])
