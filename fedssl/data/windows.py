"""Windows: pieces of a user's training history, newest at the right edge, 0 where there is nothing.

Only training events are read: the held-out last events never enter a window.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedssl import seeds


class Events(Protocol):
    """What a window needs of histories: items of all users end to end, and where each user's training part lies."""

    @property
    def items(self) -> NDArray[np.int32]:
        """Catalogue rows, (events,)."""

    @property
    def cuts(self) -> NDArray[np.int64]:
        """Where each user begins, (U + 1,)."""

    @property
    def training_ends(self) -> NDArray[np.int64]:
        """Where each user's training part ends, (U,)."""


def draw_windows(events: Events, users_U: NDArray[np.int64], keys_U: NDArray[np.uint64], *, steps: int, windows: int, length: int) -> NDArray[np.int64]:
    """Random windows of ``length`` positions and one target more. Shape: (U, S, B, length + 1), trimmed on the left.

    A history that fits is taken whole; of a longer one, every start is equally likely. What is trimmed is padding that
    all users share, so a user's own window does not depend on the others.
    """
    start_U, stop_U = events.cuts[users_U], events.training_ends[users_U]
    size_U = np.minimum(stop_U - start_U, length + 1)
    widest = max(int(size_U.max(initial=0)), 2)
    free_U = stop_U - start_U - size_U + 1
    offset_USB = seeds.integers(keys_U, steps * windows, free_U).reshape(len(users_U), steps, windows)
    end_USB = start_U[:, None, None] + offset_USB + size_U[:, None, None]
    column = np.arange(-widest, 0)
    place = end_USB[..., None] + column
    is_real = column >= -size_U[:, None, None, None]
    place = np.where(is_real, place, 0)
    if len(events.items) == 0:
        return np.zeros(place.shape, dtype=np.int64)
    return np.where(is_real, events.items[place], 0).astype(np.int64)


def count_pieces(events: Events, users_U: NDArray[np.int64], *, length: int) -> NDArray[np.int64]:
    """How many windows a history is cut into where a window is a unit of its own (`take_pieces`). Shape: (U,)."""
    full_U, rest_U = np.divmod(events.training_ends[users_U] - events.cuts[users_U], length + 1)
    result: NDArray[np.int64] = full_U + (rest_U >= 2)
    return result


def take_pieces(events: Events, users_W: NDArray[np.int64], numbers_W: NDArray[np.int64], *, length: int) -> NDArray[np.int64]:
    """Window ``numbers_W`` of each user: pieces of ``length`` positions and one target more, cut from the first event on. Shape: (W, 1, 1, length + 1).

    No event is in two windows, as input or as target; the last piece may be shorter, and a single event left over is no window.
    What is cut depends on how many events came before, so events that come later leave full windows as they are.
    """
    start_W = events.cuts[users_W] + numbers_W * (length + 1)
    size_W = np.minimum(events.training_ends[users_W] - start_W, length + 1)
    column = np.arange(-max(int(size_W.max(initial=0)), 2), 0)
    is_real = column >= -size_W[:, None]
    place = np.where(is_real, (start_W + size_W)[:, None] + column, 0)
    windows = np.where(is_real, events.items[place], 0) if len(events.items) else np.zeros(place.shape)
    return windows.astype(np.int64)[:, None, None]
