"""The gradient of each training window: the users axis with one window a "user"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedssl.config import LocalConfig
from fedssl.data.windows import Events, take_pieces
from fedssl.encoders import Encoder
from fedssl.local_training import Trained, batch_of, train_users
from fedssl.tasks import Task
from fedssl.weights import Weights

MOST_PIECES = 1 << 20
"""Windows of one user that chance tells apart."""


def window_gradients(
    encoder: Encoder,
    tasks: Sequence[tuple[Task, float]],
    weights: Weights,
    events: Events,
    places_W: NDArray[np.int64],
    users_W: NDArray[np.int64],
    numbers_W: NDArray[np.int64],
    *,
    base: tuple[str | int, ...],
    local: LocalConfig,
    window: int,
    num_items: int,
    dropout: float,
    seed: int,
) -> Trained:
    """What each window alone would change at a step size of 1: minus the slope of its own loss. One entry a window, as `Trained` has one a user.

    Guarantee: an entry depends on the weights, the window, its user's number and its own number, and on no other window.
    ``places_W``: whose, as places among ``events``; ``users_W``: their stable numbers; ``numbers_W``: which piece (`take_pieces`).
    """
    windows = take_pieces(events, places_W, numbers_W, length=window)
    batch = batch_of(tasks, windows, users_W * MOST_PIECES + numbers_W, base=base, window=window, num_items=num_items)
    one = local.model_copy(update={"steps": 1, "windows": 1, "lr": 1.0})
    return train_users(encoder, tasks, weights, batch, local=one, window=window, dropout=dropout, seed=seed)
