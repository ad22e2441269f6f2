"""Item-to-item counts: how often one item follows another, summed over users once, and what they say of a history.

A user's pairs are coalesced before they are clipped: a pair that occurs twice is one cell, or the norm would be wrong.
A sparse sum names its cells, and which cells are filled IS the history; under a plan a node sends all cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedssl.config import CountsConfig
from fedssl.data.windows import Events
from fedssl.privacy.grid import CLIP_MARGIN, LARGEST_COORDINATE
from fedssl.records import SparseSum
from fedssl.sparse_total import from_keys, sum_by_key

USERS_AT_ONCE = 512
CELLS_AT_ONCE = 1 << 22
HISTORIES_AT_ONCE = 32


@dataclass(frozen=True)
class Counts:
    """A matrix (I + 1, I + 1) of counts in CSR: row = earlier item, column = later item; row 0 and column 0 are empty.

    Shapes: starts (I + 2,), columns (cells,), values (cells,) > 0.
    """

    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    values: NDArray[np.float32]

    @property
    def num_items(self) -> int:
        """Items, without the padding row."""
        return len(self.starts) - 2


def sum_transitions(
    events: Events,
    places_U: NDArray[np.int64],
    config: CountsConfig,
    *,
    num_items: int,
    step: float,
    rows: NDArray[np.int64] | None = None,
    block: range | None = None,
) -> tuple[SparseSum, NDArray[np.bool_]]:
    """The summed counts of the users at ``places_U``, in whole steps, and which of them were broken (counted as zero).

    ``rows``: sorted items that alone are counted; others are passed over, as if they had not been met, and cells are numbered by the
    place in ``rows``. None: all items. ``block``: of the summed matrix only these rows are returned, numbered by their place in it.

    Guarantees:
      - only training events are read; each user's coalesced counts are shortened to ``config.clip_norm`` (None: raw);
      - whole numbers add exactly, so the split into nodes changes nothing.
    """
    stride = num_items + 1 if rows is None else len(rows)
    place_I = None
    if rows is not None:
        place_I = np.full(num_items + 1, -1, dtype=np.int64)
        place_I[rows] = np.arange(len(rows))
    keys, values, broken = [], [], []
    for first in range(0, len(places_U), USERS_AT_ONCE):
        key, value, is_broken = _transitions(events, places_U[first : first + USERS_AT_ONCE], config, stride, step, place_I)
        if block is not None:
            row, column = np.divmod(key, stride)
            # A user is shortened over all cells first: blocks change no number.
            is_here = (row - block.start) % block.step == 0
            key, value = ((row - block.start) // block.step * stride + column)[is_here], value[is_here]
        keys.append(key)
        values.append(value)
        broken.append(is_broken)
        if sum(map(len, keys)) > max(CELLS_AT_ONCE, 2 * len(keys[0])):
            key, value = sum_by_key(keys, values)
            keys, values = [key], [value]
    return from_keys(*sum_by_key(keys, values), (stride if block is None else len(block), stride)), np.concatenate(broken or [np.zeros(0, bool)])


def sum_items(events: Events, places_U: NDArray[np.int64], config: CountsConfig, *, num_items: int, step: float) -> NDArray[np.int64]:
    """How often each item was met, summed over the users at ``places_U``, in whole steps. Shape: (I + 1,).

    Guarantees as for `sum_transitions`: training events only, and no user is longer than ``config.clip_norm``, exactly.
    """
    total_I = np.zeros(num_items + 1, dtype=np.int64)
    for first in range(0, len(places_U), USERS_AT_ONCE):
        places = places_U[first : first + USERS_AT_ONCE]
        user_E, item_E = _training_events(events, places)
        row, steps, _ = _clipped(user_E, item_E, np.ones(len(item_E)), len(places), config.clip_norm, step)
        np.add.at(total_I, row, steps)
    return total_I


def most_popular(popularity_I: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The ``count`` rows of the largest values, sorted; of equal ones the smaller row. Row 0, padding, is never one. Shape: (N,)."""
    order = np.argsort(-popularity_I[1:], kind="stable") + 1
    return np.sort(order[:count])


def dense(sparse: SparseSum) -> NDArray[np.int64]:
    """The whole matrix in whole steps, empty cells too. Shape: ``sparse.shape``, int64."""
    matrix = np.zeros(sparse.shape, dtype=np.int64)
    matrix[sparse.rows, sparse.columns] = sparse.values
    return matrix


def _training_events(events: Events, places_U: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of some users' training events, in order: which of the users, and the item. Both (E,)."""
    start_U, size_U = events.cuts[places_U], events.training_ends[places_U] - events.cuts[places_U]
    user_E = np.repeat(np.arange(len(places_U)), size_U)
    first_E = np.repeat(np.cumsum(size_U) - size_U, size_U)
    return user_E, events.items[np.repeat(start_U, size_U) + np.arange(len(user_E)) - first_E].astype(np.int64)


def _transitions(
    events: Events, places_U: NDArray[np.int64], config: CountsConfig, stride: int, step: float, place_I: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Cells of some users: keys row * stride + column (cells,), whole steps (cells,), broken (U,)."""
    user_E, item_E = _training_events(events, places_U)
    if place_I is not None:
        is_counted_E = place_I[item_E] >= 0
        user_E, item_E = user_E[is_counted_E], place_I[item_E[is_counted_E]]
    users, pairs, weights = [], [], []
    for lag in range(1, config.lags + 1):
        if lag >= len(item_E):
            break
        is_pair = user_E[lag:] == user_E[:-lag]
        users.append(user_E[lag:][is_pair])
        pairs.append(item_E[:-lag][is_pair] * stride + item_E[lag:][is_pair])
        weights.append(np.full(len(users[-1]), config.decay ** (lag - 1)))
    if not users:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(len(places_U), bool)
    return _clipped(np.concatenate(users), np.concatenate(pairs), np.concatenate(weights), len(places_U), config.clip_norm, step)


def _clipped(
    user: NDArray[np.int64], key: NDArray[np.int64], weight: NDArray[np.float64], num_users: int, clip_norm: float | None, step: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Coalesced, one cell a user and key; then shortened to the clip, in whole steps. Keys, steps (cells,), broken (U,)."""
    order = np.lexsort((key, user))
    user, key, weight = user[order], key[order], weight[order]
    is_first = np.ones(len(user), dtype=bool)
    is_first[1:] = (user[1:] != user[:-1]) | (key[1:] != key[:-1])
    cell = np.cumsum(is_first) - 1
    total = np.bincount(cell, weight)
    user, key = user[is_first], key[is_first]
    norm_U = np.sqrt(np.bincount(user, total**2, minlength=num_users))
    if clip_norm is None:
        scale_U = np.full(num_users, 1 / step)
        largest = np.zeros(num_users)
        np.maximum.at(largest, user, total)
        is_broken = largest >= step * LARGEST_COORDINATE
    else:
        with np.errstate(divide="ignore"):
            scale_U = np.minimum(clip_norm * (1 - CLIP_MARGIN) / norm_U, 1.0) / step
        is_broken = np.zeros(num_users, dtype=bool)
    is_kept = ~is_broken[user]
    return key[is_kept], np.trunc(total * scale_U[user])[is_kept].astype(np.int64), is_broken


def keep_top(counts: Counts, top: int) -> Counts:
    """The ``top`` largest cells of each row (0: all); of equal ones the smaller column stays."""
    if top == 0:
        return counts
    row = np.repeat(np.arange(counts.num_items + 1), np.diff(counts.starts))
    order = np.lexsort((counts.columns, -counts.values, row))
    rank = np.arange(len(row)) - counts.starts[row]
    kept = np.sort(order[rank < top])
    return from_cells(row[kept], counts.columns[kept], counts.values[kept], num_items=counts.num_items)


def from_cells(rows: NDArray[np.integer], columns: NDArray[np.integer], values: NDArray[np.floating], *, num_items: int) -> Counts:
    """Counts from cells sorted by row and column."""
    starts = np.zeros(num_items + 2, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=num_items + 1), out=starts[1:])
    return Counts(starts, columns.astype(np.int32), values.astype(np.float32))


def merge_rows(one: Counts, other: Counts) -> Counts:
    """The counts of two matrices of one catalogue that share no filled row."""
    size_1, size_2 = np.diff(one.starts), np.diff(other.starts)
    starts = np.concatenate([[0], np.cumsum(size_1 + size_2)])
    columns, values = np.empty(starts[-1], dtype=np.int32), np.empty(starts[-1], dtype=np.float32)
    for part, size in ((one, size_1), (other, size_2)):
        place = np.repeat(starts[:-1] - part.starts[:-1], size) + np.arange(len(part.columns))
        columns[place], values[place] = part.columns, part.values
    return Counts(starts, columns, values)


class CountsScorer:
    """Scores of all items after a history, from counts.

    log1p: ``log(1 + scale * c)`` with ``c`` the decayed sum of the newest events' rows. log-lift: the decayed sum
    of ``log(1 + count / (scale * share of the column))``, plus ``prior`` times the log of the share: observed over expected,
    times how popular an item is anyway.
    """

    def __init__(self, counts: Counts, config: CountsConfig):
        self._counts, self._config = counts, config
        mass = np.bincount(counts.columns, counts.values, minlength=counts.num_items + 1) + 1e-3
        self._share = (mass / mass[1:].sum()).astype(np.float32)
        self._prior = (config.prior * np.log(self._share)).astype(np.float32)

    def __call__(self, histories: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        """Scores (n, I + 1) after each history (oldest first); column 0 means nothing. Cells are read for `HISTORIES_AT_ONCE` at a time."""
        scores = np.empty((len(histories), self._counts.num_items + 1), dtype=np.float32)
        for first in range(0, len(histories), HISTORIES_AT_ONCE):
            scores[first : first + HISTORIES_AT_ONCE] = self._scores(histories[first : first + HISTORIES_AT_ONCE])
        return scores

    def _scores(self, histories: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        n, width = len(histories), self._counts.num_items + 1
        config = self._config
        newest = [np.asarray(history[::-1][: config.context], dtype=np.int64) for history in histories]
        item = np.concatenate(newest)
        owner = np.repeat(np.arange(n), [len(rows) for rows in newest])
        weight = np.concatenate([config.context_decay ** np.arange(len(rows)) for rows in newest])
        start, stop = self._counts.starts[item], self._counts.starts[item + 1]
        size = stop - start
        cell = np.repeat(start - (np.cumsum(size) - size), size) + np.arange(size.sum())
        column, value = self._counts.columns[cell], self._counts.values[cell]
        if config.form == "log-lift":
            value = np.log1p(value / (config.scale * self._share[column]))
        summed = np.bincount(np.repeat(owner * width, size) + column, value * np.repeat(weight, size), minlength=n * width)
        total: NDArray[np.float32] = summed.reshape(n, width).astype(np.float32)
        scores: NDArray[np.float32] = total + self._prior if config.form == "log-lift" else np.log1p(config.scale * total, out=total)
        return scores
