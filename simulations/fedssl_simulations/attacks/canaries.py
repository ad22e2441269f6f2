"""Canaries: users whose whole update is known beforehand, for an audit. The rest of a run with them is the shipped code.

Canary ``c`` (from 0) has met nothing but item ``c + 1``, and its loss is minus the sum of that item's one number over a
window. So its update has one coordinate, that item's, and is `WINDOW` long before the clip; every other canary's update is
orthogonal to it. Their histories fill several windows and read an item several times in each, so that a weight by windows,
or a row that is listed twice, would show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedssl.config import EncoderConfig, TaskConfig
from fedssl.data.histories import Histories
from fedssl.encoders import Encoder
from fedssl.tasks import Chance, Task, UsersModel, Views
from fedssl.weights import Weights

WINDOW = 4
_EVENTS = 4 * WINDOW + 3
"""Four windows, the target of the last one, and two events that are held out."""


def canary_encoder(config: EncoderConfig) -> Encoder:
    """Hidden states that are the item vectors themselves; its one weight is not used."""

    def init(rng: torch.Generator) -> Weights:
        return {"unused": torch.zeros(1)}

    def encode(weights: Weights, rows_UBLD: Tensor, is_padding_UBL: Tensor, masks: Sequence[Tensor]) -> Tensor:
        return rows_UBLD

    return Encoder(init, encode, dropout_sites=0)


def canary_task(config: TaskConfig, *, num_items: int) -> Task:
    """Minus the sum of all vectors of a window: the slope is -1 wherever an item stands, whatever the weights are."""

    def draw(windows_USBL1: NDArray[np.int64], chance: Chance) -> Views:
        return Views({"read": windows_USBL1[..., 1:]})

    def loss(model: UsersModel, sequences: Mapping[str, Tensor]) -> Tensor:
        return -model.encode(sequences["read"]).sum((1, 2, 3))

    return Task(draw, loss)


def canary_histories(canaries: NDArray[np.int64]) -> Histories:
    """The histories of these canaries, in that order."""
    cuts = np.arange(len(canaries) + 1, dtype=np.int64) * _EVENTS
    return Histories(np.repeat(canaries + 1, _EVENTS).astype(np.int32), cuts, None, tuple(f"canary {number}" for number in canaries.tolist()))
