"""Whom a run takes: one user lives on one node, and a node has no more of them than it may."""

from __future__ import annotations

import numpy as np
import pytest
from fedssl_server.nodes import MOST_USERS, take_nodes

from fedssl.errors import WireError


def users(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_of_two_nodes_that_say_one_user_lives_on_them_neither_is_believed():
    taken, left_out = take_nodes({1: users(0, 3), 2: users(3), 3: users(1)})
    assert list(taken) == [3]
    assert left_out.keys() == {1, 2} and "user 3 lives on another node too" in left_out[2]


def test_a_node_that_is_left_out_for_its_number_of_users_takes_no_user_from_others():
    taken, left_out = take_nodes({1: users(0), 2: users(0, 1, 2), 3: users(1)}, most_users=1)
    assert list(taken) == [1, 3] and list(left_out) == [2]


@pytest.mark.parametrize("wrong", [users(), users(2, 1), users(1, 1), users(-1, 2), users(10), users(MOST_USERS)])
def test_numbers_that_are_none_unsorted_double_or_out_of_range_are_left_out(wrong: np.ndarray):
    taken, left_out = take_nodes({1: wrong, 2: users(9)}, num_users=10)
    assert list(taken) == [2] and list(left_out) == [1]


def test_without_a_number_of_users_no_node_can_make_arrays_of_any_length():
    assert list(take_nodes({1: users(MOST_USERS), 2: users(MOST_USERS - 1)})[0]) == [2]


def test_where_no_node_is_left_it_says_why():
    with pytest.raises(WireError, match="no node may take part: node 4: it hosts 2 users, and a node may host 1"):
        take_nodes({4: users(0, 1)}, most_users=1)
    with pytest.raises(WireError, match="none is there"):
        take_nodes({})
