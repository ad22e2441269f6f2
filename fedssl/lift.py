"""A lift table: how much more often an item follows another than its popularity says, and the scores that this gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedssl.config import CountsConfig


@dataclass(frozen=True)
class LiftTable:
    """What is known of pairs of the items that were counted, as logs of observed over expected.

    Shapes: ``rows`` (N,), sorted catalogue rows of the items that were counted; ``lift`` (N, N), row = earlier item, column = later
    one; ``log_popularity`` (I + 1,), logs of shares that add up to 1, and 0 for the padding; ``log_repeat`` (1,): how
    much more often people come back to an item than its popularity says. int64, and else float32.
    """

    rows: NDArray[np.int64]
    lift: NDArray[np.float32]
    log_popularity: NDArray[np.float32]
    log_repeat: NDArray[np.float32]

    @property
    def num_items(self) -> int:
        """Items of the catalogue, without the padding row."""
        return len(self.log_popularity) - 1


class LiftScorer:
    """Scores of all items after a history: ``prior`` times the log popularity, the decayed lifts of the newest events that were
    counted, and ``returns`` times the log of a return for what was met.
    """

    def __init__(self, table: LiftTable, config: CountsConfig):
        self._table, self._config = table, config
        self._place_I = np.full(table.num_items + 1, -1, dtype=np.int64)
        self._place_I[table.rows] = np.arange(len(table.rows))

    def __call__(self, histories: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        """Scores (n, I + 1) after each history (oldest first); column 0 means nothing."""
        table, config = self._table, self._config
        scores: NDArray[np.float32] = np.tile(np.float32(config.prior) * table.log_popularity, (len(histories), 1))
        lifts: NDArray[np.float32] = np.zeros((len(histories), len(table.rows)), dtype=np.float32)
        for number, history in enumerate(histories):
            met = np.asarray(history, dtype=np.int64)
            places = self._place_I[met]
            newest = places[places >= 0][::-1][: config.context]
            lifts[number] = np.float32(config.context_decay) ** np.arange(len(newest), dtype=np.float32) @ table.lift[newest]
            scores[number, np.unique(met)] += np.float32(config.returns) * table.log_repeat
        scores[:, table.rows] += lifts
        return scores
