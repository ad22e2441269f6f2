import numpy as np
import pytest
from oracles.slow_beyond_accuracy import slow_interval
from scipy.stats import binom

from fedssl.intervals import bootstrap_interval


def test_of_hits_and_misses_the_interval_is_that_of_a_binomial():
    low, high = bootstrap_interval(np.repeat([0.0, 1.0], [70, 30]))
    assert low == pytest.approx(binom.ppf(0.025, 100, 0.3) / 100, abs=0.011)
    assert high == pytest.approx(binom.ppf(0.975, 100, 0.3) / 100, abs=0.011)


def test_the_interval_is_that_of_users_drawn_one_by_one():
    values = np.round(np.random.default_rng(5).exponential(size=60), 1)
    assert bootstrap_interval(values) == pytest.approx(slow_interval(values.tolist(), 4000), abs=0.03)


def test_one_user_or_users_alike_leave_no_doubt_and_the_same_values_the_same_interval():
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)
    values = np.array([0.0, 0.5, 1.0, 1.0])
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
