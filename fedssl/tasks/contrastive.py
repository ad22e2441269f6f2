"""Contrast: two views of a user's window read alike, histories that nobody has do not.

A lone client has nobody else's windows for negatives, and with one window of its own the usual loss is exactly 0. So its
negatives are INVENTED: its own window (the last drawn) with items replaced by others from the public catalogue. They share
the length, the order and some items with the real window, and every client that has one event gets a slope.
Source of views and loss: Xie et al. 2022 (CL4SRec), https://arxiv.org/abs/2010.14395, equation 3; the negatives are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedssl import views
from fedssl.config import TaskConfig
from fedssl.losses import info_nce
from fedssl.tasks import Chance, Task, UsersModel, Views

FORM = "InfoNCE of two views (crop, mask or reorder) of one window"
NEGATIVES = "invented histories: the window with items replaced by ones drawn from the catalogue"


def contrastive(config: TaskConfig, *, num_items: int) -> Task:
    """InfoNCE of two views (crop, mask or reorder) of each window against ``config.negatives`` invented histories.

    ``config.keep``: share of a window that a view leaves as it is, and the chance that an invented history keeps an item. Its
    newest item, which says most, is always another one (where the catalogue has two).
    """
    negatives = max(config.negatives, 1)

    def draw(windows_USBL1: NDArray[np.int64], chance: Chance) -> Views:
        windows = windows_USBL1[..., -chance.window :]
        U, S, B, L = windows.shape
        left, right = (
            views.any_of(
                windows,
                config.keep,
                columns=chance.columns(side, S, B, L),
                where=chance.uniform(f"{side} where", S, B),
                choice=chance.uniform(f"{side} choice", S, B),
            )
            for side in ("left", "right")
        )
        real = np.broadcast_to(windows[:, :, -1:], (U, S, negatives, L))
        # Never the item itself: the others are 1 to I - 1 places after it, around the catalogue.
        places = 1 + (chance.columns("invented", S, negatives, L) * (num_items - 1)).astype(np.int64)
        drawn = 1 + (real - 1 + places) % num_items
        is_kept = chance.columns("kept", S, negatives, L) < config.keep
        is_kept[..., -1] = False
        invented = np.where(is_kept | (real == 0), real, drawn)
        return Views({"left": left, "right": right, "invented": invented})

    def loss(model: UsersModel, sequences: Mapping[str, Tensor]) -> Tensor:
        left, right, invented = (model.after(sequences[name]) for name in ("left", "right", "invented"))
        return info_nce(left, right, invented, temperature=config.temperature)

    return Task(draw, loss, encoder="any")
