"""Chance of a task: keyed by user and purpose, and blind to padding and company."""

from __future__ import annotations

import numpy as np

from fedssl.tasks import Chance

USERS = np.array([3, 9, 4])
CHANCE = Chance((1, "training", 2, 0), USERS, window=10)


def test_columns_are_cut_on_the_left_whatever_the_padding():
    whole = CHANCE.columns("kept", 2, 3, 10)
    assert whole.shape == (3, 2, 3, 10)
    for width in (1, 4, 9):
        assert (CHANCE.columns("kept", 2, 3, width) == whole[..., -width:]).all()


def test_a_users_numbers_do_not_depend_on_company():
    alone = Chance(CHANCE.base, USERS[1:2], window=10)
    assert (alone.uniform("where", 2, 3) == CHANCE.uniform("where", 2, 3)[1]).all()
    assert (alone.columns("kept", 2, 7) == CHANCE.columns("kept", 2, 7)[1]).all()
    assert (alone.integers("negatives", 5, 100) == CHANCE.integers("negatives", 5, 100)[1]).all()


def test_users_purposes_rounds_and_tasks_draw_different_numbers():
    drawn = [CHANCE.uniform("left")[0], CHANCE.uniform("left")[1], CHANCE.uniform("right")[0]]
    drawn += [Chance(base, USERS, window=10).uniform("left")[0] for base in ((1, "training", 3, 0), (1, "training", 2, 1), (2, "training", 2, 0))]
    assert len({float(number) for number in drawn}) == 6


def test_whole_numbers_lie_below_their_bound_and_reach_all_of_them():
    assert set(CHANCE.integers("negatives", 200, 7).reshape(-1).tolist()) == set(range(7))
