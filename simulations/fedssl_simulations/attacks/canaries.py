"""Canaries: users whose whole update is known beforehand, for an audit. The rest of a run with them is the shipped code.

Canary ``c`` (from 0) has met nothing but item ``c + 1``, and its loss is minus the sum of that item's one number over a
window. So its update has one coordinate, that item's, and is `WINDOW` long before the clip; every other canary's update is
orthogonal to it. Their histories fill several windows and read an item several times in each, so that a weight by windows,
or a row that is listed twice, would show. Canaries of other shapes serve the audits of counts, of users who add
their own noise, and of windows.
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
        return -model.encode(sequences["read"]).sum((2, 3)).mean(1)

    return Task(draw, loss, is_by_window=True)


def opposite_task(config: TaskConfig, *, num_items: int) -> Task:
    """Minus the sum of item 1's number over a window where it stands, plus the same where item 2 does: two users as far apart as the clip allows."""

    def draw(windows_USBL1: NDArray[np.int64], chance: Chance) -> Views:
        read = windows_USBL1[..., 1:]
        return Views({"up": (read == 1).astype(np.int64), "down": (read == 2).astype(np.int64)})

    def loss(model: UsersModel, sequences: Mapping[str, Tensor]) -> Tensor:
        return (model.encode(sequences["down"]) - model.encode(sequences["up"])).sum((1, 2, 3))

    return Task(draw, loss)


def canary_histories(canaries: NDArray[np.int64]) -> Histories:
    """The histories of these canaries, in that order."""
    return _histories(np.repeat(canaries + 1, _EVENTS), users=len(canaries))


def opposite_histories(met_first_N: NDArray[np.bool_]) -> Histories:
    """Users who met nothing but item 1, or nothing but item 2: for `opposite_task`."""
    return canary_histories(np.where(met_first_N, 0, 1))


def pair_histories(canaries: NDArray[np.int64], items: int) -> Histories:
    """Canary ``c`` met item ``c // items + 1`` and then item ``c % items + 1``; two more events are held out. It counts one pair."""
    first, second = np.divmod(canaries, items)
    return _histories(np.stack([first, second, second, second], axis=1).reshape(-1) + 1, users=len(canaries))


def window_histories(canaries: NDArray[np.int64]) -> Histories:
    """One user, whose training windows are these canaries, in that order: one whole window, with its target, of each one's item."""
    held_out = np.ones(2, dtype=np.int64)
    return _histories(np.concatenate([np.repeat(canaries + 1, WINDOW + 1), held_out]), users=1)


def _histories(items: NDArray[np.int64], *, users: int) -> Histories:
    """Users with the same number of events each."""
    cuts = np.arange(users + 1, dtype=np.int64) * (len(items) // max(users, 1))
    return Histories(items.astype(np.int32), cuts, None, tuple(f"canary {number}" for number in range(users)))
