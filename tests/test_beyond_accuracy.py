import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.slow_beyond_accuracy import slow_best, slow_gini, slow_of_lists

from fedssl.beyond_accuracy import best_items, gini, of_lists


@settings(max_examples=100, deadline=None)
@given(data=st.data(), users=st.integers(1, 4), items=st.integers(1, 8), k=st.integers(1, 10))
def test_lists_equal_the_slow_version_with_nan_and_infinities(data, users, items, k):
    rows = []
    for _ in range(users):
        row = [float(number) for number in data.draw(st.permutations(range(items + 1)))]
        row[data.draw(st.integers(0, items))] = data.draw(st.sampled_from([math.nan, -math.inf, math.inf, 0.5]))
        rows.append(row)
    pairs = data.draw(st.lists(st.tuples(st.integers(0, users - 1), st.integers(0, items)), max_size=20))
    scores = torch.tensor(rows)
    of_all, unseen = best_items(scores, k, (np.array([u for u, _ in pairs], np.int64), np.array([i for _, i in pairs], np.int64)))
    np.testing.assert_array_equal(scores.numpy(), rows)  # as they came
    for user, row in enumerate(rows):
        assert of_all[user].tolist() == slow_best(row, k)
        assert unseen[user].tolist() == slow_best(row, k, {i for u, i in pairs if u == user})


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_gini_equals_the_mean_difference_of_all_pairs(amounts):
    assert gini(np.array(amounts)) == pytest.approx(slow_gini(amounts), abs=1e-12)


def test_gini_by_hand():
    assert gini(np.array([5, 5, 5])) == 0
    assert gini(np.array([0, 0, 0, 8])) == 0.75
    assert gini(np.array([0, 0])) == 0


@settings(max_examples=100, deadline=None)
@given(data=st.data(), items=st.integers(1, 6))
def test_what_is_in_lists_equals_the_slow_version(data, items):
    lists = data.draw(st.lists(st.lists(st.integers(0, items), min_size=3, max_size=3), min_size=1, max_size=6))
    popularity = [0, *data.draw(st.lists(st.integers(0, 9), min_size=items, max_size=items))]
    own = data.draw(st.lists(st.floats(0.5, 9), min_size=len(lists), max_size=len(lists)))
    if not any(map(any, lists)):
        lists[0][0] = 1
    assert of_lists(np.array(lists), np.array(popularity), np.array(own)) == pytest.approx(slow_of_lists(lists, popularity, own))


def test_what_is_in_lists_by_hand():
    # Two of four items are recommended. With one event more each, the items hold 4, 2, 1 and 1 of 8 events: 1, 2, 3 and 3 bits.
    found = of_lists(np.array([[1, 2], [1, 0]]), np.array([0, 3, 1, 0, 0]), np.array([1.0, 1.5]))
    assert found == pytest.approx({"coverage": 0.5, "gini": 7 / 12, "novelty": (1 + 2 + 1) / 3, "popularity_lift": ((3 + 1) / 2 + 3) / 2.5 - 1})


def test_a_lift_over_items_that_nobody_took_is_none():
    assert of_lists(np.array([[1]]), np.array([0, 0]), np.array([0.0]))["popularity_lift"] is None
