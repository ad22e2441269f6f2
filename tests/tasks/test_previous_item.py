"""Previous item: a window is read backwards, and each event is asked for the one before it."""

from __future__ import annotations

import numpy as np

from fedssl.config import TaskConfig
from fedssl.tasks import Chance
from fedssl.tasks.previous_item import previous_item

WINDOWS = np.array([[3, 1, 4, 1, 5], [0, 0, 0, 9, 2], [0, 0, 0, 0, 6], [0, 0, 0, 0, 0]])[:, None, None]
CHANCE = Chance((1, 2), np.arange(4), window=4)


def test_targets_are_the_events_before():
    views = previous_item(TaskConfig(name="previous-item"), num_items=50).draw(WINDOWS, CHANCE)
    assert views.ranks_all and views.candidates is None
    assert views.sequences["read"][:, 0, 0].tolist() == [[5, 1, 4, 1], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert views.sequences["target"][:, 0, 0].tolist() == [[1, 4, 1, 3], [0, 0, 0, 9], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_negatives_are_drawn_for_each_user():
    views = previous_item(TaskConfig(name="previous-item", negatives=20), num_items=50).draw(WINDOWS, CHANCE)
    assert not views.ranks_all and views.candidates is not None and views.candidates.shape == (4, 20)
    assert len({tuple(sorted(rows)) for rows in views.candidates.tolist()}) == 4


def test_it_is_for_causal_encoders_and_may_train_under_window_level_privacy():
    task = previous_item(TaskConfig(name="previous-item"), num_items=50)
    assert task.encoder == "causal" and task.is_by_window
