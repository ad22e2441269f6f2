"""Views: other readings of a window, for contrast. Chance comes in as numbers drawn before.

Source: Xie et al. 2022 (CL4SRec), https://arxiv.org/abs/2010.14395, section 3.2. Windows (..., L) are rows padded with 0 on
the left; views have the same shape and padding, and `mask` alone leaves gaps. Chances are numbers in [0, 1) of the shapes named.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Uniform = NDArray[np.float64]


def crop(windows: Rows, keep: float, *, where: Uniform) -> Rows:
    """A contiguous piece of each window, pushed to the right edge. ``where``: (...,), where the piece begins."""
    L = windows.shape[-1]
    length = (windows > 0).sum(-1)
    size = _share(length, keep)
    cut = (length - size) - (where * (length - size + 1)).astype(np.int64)
    column = np.arange(L)
    rolled = np.take_along_axis(windows, (column - cut[..., None]) % L, -1)
    return np.where(column >= L - size[..., None], rolled, 0)


def mask(windows: Rows, keep: float, *, columns: Uniform) -> Rows:
    """Each item stays with chance ``keep``, else its place is empty; the newest stays. ``columns``: (..., L)."""
    is_kept = columns < keep
    is_kept[..., -1] = True
    return np.where(is_kept, windows, 0)


def reorder(windows: Rows, keep: float, *, columns: Uniform, where: Uniform) -> Rows:
    """A contiguous piece of each window, all but ``keep`` of it, is shuffled. ``columns``: (..., L) order it, ``where``: (...,) places it."""
    L = windows.shape[-1]
    length = (windows > 0).sum(-1)
    size = length - _share(length, keep)
    begin = L - length + (where * (length - size + 1)).astype(np.int64)
    column = np.arange(L)
    is_moved = (column >= begin[..., None]) & (column < (begin + size)[..., None])
    # Columns outside the piece keep their number as sort key; inside, keys are random between its ends.
    order = np.where(is_moved, begin[..., None] + columns * size[..., None], column.astype(np.float64))
    return np.take_along_axis(windows, np.argsort(order, axis=-1, kind="stable"), -1)


def reverse(windows: Rows) -> Rows:
    """Each window from its newest event to its oldest; the padding stays on the left."""
    L = windows.shape[-1]
    column = np.arange(L)
    begin = L - (windows > 0).sum(-1, keepdims=True)
    return np.take_along_axis(windows, np.where(column < begin, column, begin + L - 1 - column), -1)


def any_of(windows: Rows, keep: float, *, columns: Uniform, where: Uniform, choice: Uniform) -> Rows:
    """Crop, mask or reorder, each with chance 1/3, one choice a window. ``choice``: (...,)."""
    chosen = (choice * 3).astype(np.int64)[..., None]
    cropped = crop(windows, keep, where=where)
    masked = mask(windows, keep, columns=columns)
    reordered = reorder(windows, keep, columns=columns, where=where)
    return np.where(chosen == 0, cropped, np.where(chosen == 1, masked, reordered))


def hide(windows: Rows, keep: float, *, columns: Uniform) -> NDArray[np.bool_]:
    """Which events a cloze hides: the newest, and each other with chance ``1 - keep``. ``columns``: (..., L).

    At least one event is not: where chance would hide all, the newest is hidden alone. Of fewer than two events none is.
    """
    is_event = windows > 0
    size = is_event.sum(-1)
    is_hidden = is_event & (columns >= keep)
    is_hidden[..., -1] = True
    is_hidden[is_hidden.sum(-1) >= size, :-1] = False
    is_hidden &= (size > 1)[..., None]
    return is_hidden


def _share(length: NDArray[np.int64], keep: float) -> NDArray[np.int64]:
    """``keep`` of a length, rounded up; 0.07 of 100 is 7, though the product in floats is a little more."""
    share: NDArray[np.int64] = np.ceil(length * keep - 1e-9).astype(np.int64)
    return share
