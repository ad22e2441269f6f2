"""A lift table as a recommender, against the formula written out."""

import numpy as np
import pytest

from fedssl.config import CountsConfig
from fedssl.lift import LiftScorer, LiftTable

TABLE = LiftTable(
    rows=np.array([1, 3, 4]),
    lift=np.array([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0], [0.5, 0.25, 0.0]], dtype=np.float32),
    log_popularity=np.log(np.array([1.0, 0.4, 0.3, 0.2, 0.1], dtype=np.float32)),
    log_repeat=np.array([-2.0], dtype=np.float32),
)
CONFIG = CountsConfig(context=2, context_decay=0.5, prior=1.5, returns=3.0)


def scores(*history: int) -> list[float]:
    found = LiftScorer(TABLE, CONFIG)([np.array(history, dtype=np.int32)])
    assert found.shape == (1, 5) and found.dtype == np.float32
    return [float(score) for score in found[0, 1:]]


def test_without_a_history_the_more_popular_scores_more():
    assert scores() == pytest.approx([1.5 * np.log(share) for share in (0.4, 0.3, 0.2, 0.1)])


def test_the_newest_counted_events_are_read_and_items_that_were_not_counted_are_passed_over():
    prior = 1.5 * np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    # Newest first: 4, then 3; item 2 was not counted, item 1 is too old.
    lifts = np.array([0.5 + 0.5 * 3.0, 0.0, 0.25, 0.0 - 0.5])
    met = np.array([1, 1, 1, 1]) * 3.0 * -2.0
    assert scores(1, 3, 2, 4) == pytest.approx(prior + lifts + met, rel=1e-6)


def test_what_was_met_is_held_back_once_however_often_it_was_met():
    once, twice = scores(2), scores(2, 2, 2)
    assert once == twice
    assert once[1] == pytest.approx(1.5 * np.log(0.3) - 6.0, rel=1e-6)


def test_many_histories_score_as_each_alone():
    many = [[1, 3], [], [4, 4, 1]]
    found = LiftScorer(TABLE, CONFIG)([np.array(items, dtype=np.int32) for items in many])
    assert [row[1:].tolist() for row in found] == [scores(*items) for items in many]
