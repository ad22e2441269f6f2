"""Chance as data: a known generator, the same wherever and with whom it is drawn, and even."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedssl import seeds

LARGEST = 2**64 - 1


def splitmix64(state: int, count: int) -> list[int]:
    """SplitMix64 in whole numbers, as published."""
    drawn = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & LARGEST
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & LARGEST
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & LARGEST
        drawn.append(z ^ (z >> 31))
    return drawn


def test_the_generator_is_splitmix64():
    """The numbers that the reference implementation prints for seed 1234567."""
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, 5) == reference
    drawn = seeds.uniform(np.array([1234567], dtype=np.uint64), 5)
    assert drawn[0].tolist() == [(z >> 11) * 2.0**-53 for z in reference]


@given(st.lists(st.integers(0, LARGEST), min_size=1, max_size=4), st.integers(0, 20))
def test_every_user_draws_a_stream_of_its_own_below_one(keys: list[int], count: int):
    drawn = seeds.uniform(np.array(keys, dtype=np.uint64), count)
    assert drawn.tolist() == [[(z >> 11) * 2.0**-53 for z in splitmix64(key, count)] for key in keys]
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_the_first_numbers_do_not_depend_on_the_count():
    keys = np.array([1, 2, 3], dtype=np.uint64)
    for count in (0, 1, 7):
        assert (seeds.uniform(keys, 50)[:, :count] == seeds.uniform(keys, count)).all()
        assert (seeds.integers(keys, 50, 9)[:, :count] == seeds.integers(keys, count, 9)).all()


def test_order_and_types_of_a_keys_words_matter():
    words = [(), ("a",), ("a", "b"), ("b", "a"), ("ab",), (1,), ("1",), (1, 2), (2, 1), (12,), (1, "2"), ("1", 2), (1, 2, ""), ("a", 1), ("a1",), (-1,)]
    assert len({seeds.key(*some) for some in words}) == len(words)
    assert seeds.key("a", 1) == seeds.key("a", 1)


def test_a_key_is_the_same_on_every_machine():
    """Written down once: nodes of one federation must draw alike, whatever runs them."""
    assert seeds.key(1, "training", 3, "windows") == 0x7A20E19E10806E3B


def test_a_users_key_depends_on_its_number_and_not_on_company():
    base = seeds.key("x")
    crowd = seeds.keys_of_users(base, np.arange(1000))
    assert len(set(crowd.tolist())) == 1000
    assert seeds.keys_of_users(base, np.array([17])).tolist() == [crowd[17]]
    assert not set(crowd.tolist()) & set(seeds.keys_of_users(seeds.key("y"), np.arange(1000)).tolist())


def test_numbers_are_even_and_independent_along_users_and_along_draws():
    drawn = seeds.uniform(seeds.keys_of_users(seeds.key("even"), np.arange(500)), 400)
    n = drawn.size
    assert abs(drawn.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(drawn.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    counts = np.bincount((drawn * 64).astype(int).reshape(-1), minlength=64)
    # Chi-squared with 63 degrees of freedom: mean 63, deviation 11.2.
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 4 * 11.2
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:]), (drawn[:-7], drawn[7:])):
        assert abs(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) < 4 / n**0.5


@given(st.integers(1, 2**31), st.integers(1, 9), st.integers(0, LARGEST))
def test_whole_numbers_lie_below_their_bound(high: int, other: int, key: int):
    keys = np.array([key, key], dtype=np.uint64)
    drawn = seeds.integers(keys, 20, np.array([high, other]))
    assert drawn.min() >= 0
    assert drawn[0].max() < high and drawn[1].max() < other
    assert seeds.integers(keys, 20, high)[0].tolist() == drawn[0].tolist()


@given(st.integers(1, 2**31))
def test_the_largest_number_does_not_round_up_to_its_bound(high: int):
    assert int((1 - 2.0**-53) * high) == high - 1


def test_whole_numbers_are_even():
    counts = np.bincount(seeds.integers(np.arange(100, dtype=np.uint64), 700, 7).reshape(-1))
    assert (np.abs(counts - 10_000) < 5 * (70_000 * 6 / 49) ** 0.5).all()
