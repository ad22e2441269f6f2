"""Transition counts and their scores, slow and obvious: loops over users, events and cells; whole numbers are exact."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def user_cells(items: Sequence[int], lags: int, decay: float) -> dict[tuple[int, int], float]:
    """One user's coalesced counts: each pair (earlier, later) up to ``lags`` events apart, in its cell."""
    cells: dict[tuple[int, int], float] = defaultdict(float)
    for lag in range(1, lags + 1):
        for place in range(len(items) - lag):
            cells[items[place], items[place + lag]] += decay ** (lag - 1)
    return dict(cells)


def user_steps(items: Sequence[int], lags: int, decay: float, step: float) -> dict[tuple[int, int], int]:
    """The same in whole steps, without a clip."""
    return {cell: math.trunc(value / step) for cell, value in user_cells(items, lags, decay).items()}


def slow_scores(
    table: NDArray[np.float64], history: Sequence[int], *, context: int, context_decay: float, form: str, scale: float, prior: float
) -> list[float]:
    """Scores of items 1 .. I after a history, from a dense table (I + 1, I + 1)."""
    newest = list(reversed(history))[:context]
    side = len(table)
    mass = [sum(table[row][column] for row in range(side)) + 1e-3 for column in range(side)]
    share = [one / sum(mass[1:]) for one in mass]
    scores = []
    for column in range(1, side):
        if form == "log1p":
            total = sum(context_decay**back * table[item][column] for back, item in enumerate(newest))
            scores.append(math.log(1 + scale * total))
        else:
            lift = sum(context_decay**back * math.log(1 + table[item][column] / (scale * share[column])) for back, item in enumerate(newest))
            scores.append(lift + prior * math.log(share[column]))
    return scores
